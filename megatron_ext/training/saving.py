"""A run as a checkpoint and back: model, optimizer, schedule, generators, counters."""

import random
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    convert_cuda_rng_state,
    get_cuda_rng_tracker,
    is_graph_safe_cuda_rng_tracker,
)

from megatron_ext.checkpoint import checkpoints, writer
from megatron_ext.checkpoint.identity import tokenizer_sha256
from megatron_ext.checkpoint.saved_args import complete
from megatron_ext.cli.parser import dashed
from megatron_ext.cli.programs import flags_as_dict
from megatron_ext.cli.size_flags import megatron_args
from megatron_ext.distillation import native
from megatron_ext.model.build import model_state_dict
from megatron_ext.model.open import set_weights
from megatron_ext.runtime.errors import CHECKPOINT, UserError, note, warn
from megatron_ext.training import phase, torch_adam
from megatron_ext.training.state import Run

# Optimizer state as whole tensors: any layout reads it, also of the distributed optimizer.
OPTIMIZER_LAYOUT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


def save(run: Run) -> None:
    """Write ``run`` as a checkpoint of its iteration. Collective."""
    flags, counters = run.flags, run.counters
    state = _trained_state(run)
    if flags.checkpoint.save_optim:
        state["optimizer"] = _optimizer_state(run, state, is_loading=False)
        state["opt_param_scheduler"] = run.schedule.state_dict()
    if flags.checkpoint.save_rng:
        state["rng_state"] = _rng_state(run.groups)
    state |= {
        "args": saved_args(run),
        "checkpoint_version": 3.0,
        "iteration": counters.iteration,
        "num_floating_point_operations_so_far": counters.floating_point_operations,
    }
    interval = flags.checkpoint.save_retain_interval
    writer.save(
        flags.checkpoint.save,
        checkpoints.iteration_name(counters.iteration),
        state,
        files={
            **megatron_args(run.arch),
            **run.tokenizer_files,
        },
        dp_group=run.groups.dp_cp,
        content_metadata=OPTIMIZER_LAYOUT,
        keep=lambda name: not interval or int(name.removeprefix("iter_")) % interval == 0,
    )


def saved_args(run: Run) -> Namespace:
    """Return the flags and sizes of ``run`` under Megatron-LM's names; plain values only."""
    return complete(
        run.arch,
        {
            **flags_as_dict(run.flags),
            "world_size": torch.distributed.get_world_size(),
            "data_parallel_size": run.groups.dp.size(),
            "params_dtype": run.chunks[0].config.params_dtype,
            "no_save_optim": not run.flags.checkpoint.save_optim,
            "no_save_rng": not run.flags.checkpoint.save_rng,
            "consumed_train_samples": run.counters.consumed_train_samples,
            "consumed_data_samples": run.counters.consumed_data_samples,
            "hidden_loss_alpha": run.wrapped.hidden.ratio,
            "logged_loss_sums": dict(run.counters.loss_sums),
            "tokenizer_sha256": tokenizer_sha256(run.flags.data),
            **run.origin,
            "logit_kernels": native.name(torch.cuda.current_device()),
        },
    )


def _trained_state(run: Run) -> ShardedStateDict:
    """Return the model and what else is trained, as this rank's sharded tensors."""
    return model_state_dict(run.chunks) | run.wrapped.hidden.sharded_state()


def restore(run: Run, source: checkpoints.Checkpoint) -> None:
    """Continue where ``source`` was saved: weights, optimizer, schedule, generators, counters.

    Collective. Random state is taken up only under the layout that wrote it.
    """
    flags = run.flags
    phase.check_goes_on(source, load_optim=flags.checkpoint.load_optim)
    state = _trained_state(run)
    if flags.checkpoint.load_optim:
        _check_optimizer_parts(run, source)
        torch_adam.allocate(run.optimizer)
        state["optimizer"] = _optimizer_state(run, state, is_loading=True)
    same_ranks = all(
        source.args.get(name, 1) == getattr(flags.parallel, name)
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "expert_model_parallel_size",
        )
    )
    if run.groups.ep.size() > 1:
        same_ranks &= source.args.get("world_size") == torch.distributed.get_world_size()
    has_rng = same_ranks and not source.args.get("no_save_rng", False)
    if flags.checkpoint.load_rng and has_rng:
        state["rng_state"] = _rng_state(run.groups)
    loaded = checkpoints.load(source.folder, state)
    set_weights(run.chunks, loaded, source)
    run.wrapped.hidden.load(loaded, source.args.get("hidden_loss_alpha"))
    if flags.checkpoint.load_optim:
        # megatron-core finds the saved groups of parameters by their learning rates too: the typed
        # rates stand in both while they are loaded. The schedule's own rates, which may be the
        # saved ones, are written into the groups when the schedule has been restored.
        _set_rates(run, _param_groups(loaded["optimizer"]))
        run.optimizer.load_state_dict(loaded["optimizer"])
        torch_adam.fuse(run.optimizer)
        _restore_schedule(run, loaded["opt_param_scheduler"], source)
        _set_rates(run, run.optimizer.param_groups)
        _set_typed(run)
        run.schedule.step(increment=0)
    else:
        run.optimizer.reload_model_params()  # its float32 copies of what was there before
        done = source.iteration * flags.batch.global_batch_size
        if flags.batch.train_samples is not None:
            done = source.args["consumed_train_samples"]
        run.schedule.step(increment=done)
    if "rng_state" in state:
        _set_rng_state(loaded["rng_state"])
    run.counters.iteration = source.iteration
    run.counters.consumed_train_samples = source.args["consumed_train_samples"]
    run.counters.consumed_data_samples = phase.consumed_data_samples(source.args, flags)
    run.counters.loss_sums = dict(source.args.get("logged_loss_sums") or {})
    for name, (before, now) in phase.changes(source.args, flags).items():
        warn(f"{dashed(name)}: {before} before, {now} from here on; the data begin anew.")
    if table := phase.table_of_changes(source.args, vars(saved_args(run))):
        note(f"going on from {source.folder} with other flags:\n{table}")
    done = loaded.get("num_floating_point_operations_so_far")
    run.counters.floating_point_operations = done or 0.0  # for the log; old Megatron-LM has none


def _set_rates(run: Run, param_groups: Iterable[dict[str, Any]]) -> None:
    """Write the schedule's highest and lowest learning rate into ``param_groups``."""
    options, schedule = run.flags.optimizer, run.schedule
    for group in param_groups:
        group |= {"max_lr": schedule.max_lr, "min_lr": schedule.min_lr}
        if not group["default_config"]:  # of embedding and output layer, --decoupled-lr
            group["max_lr"] = options.decoupled_lr
            if options.decoupled_min_lr is not None:
                group["min_lr"] = options.decoupled_min_lr


def _set_typed(run: Run) -> None:
    """Use the typed constants of the update rule; megatron-core's groups hold the saved ones."""
    options = run.flags.optimizer
    typed = {
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_eps,
        "momentum": options.sgd_momentum,
    }
    for group in run.optimizer.param_groups:
        group.update({name: value for name, value in typed.items() if name in group})


def _param_groups(saved: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    """Yield the groups of parameters in the saved state of an optimizer, or of several."""
    for name, value in saved.items():
        if name == "param_groups":
            yield from value
        elif isinstance(value, dict):
            yield from _param_groups(value)


def _restore_schedule(run: Run, saved: dict[str, Any], source: checkpoints.Checkpoint) -> None:
    batch_size = run.flags.batch.global_batch_size
    before = source.args.get("global_batch_size") or batch_size
    if run.flags.batch.train_samples is not None:
        before = batch_size  # it counts as the run does
    try:
        run.schedule.load_state_dict(phase.rescaled_schedule(saved, before, batch_size))
    except AssertionError as error:
        raise UserError(
            f"{source.folder} was trained with another schedule ({' '.join(str(error).split())}): "
            "--override-opt-param-scheduler takes the typed one, "
            "--use-checkpoint-opt-param-scheduler the saved one.",
            CHECKPOINT,
        ) from error


def _check_optimizer_parts(run: Run, source: checkpoints.Checkpoint) -> None:
    was_split = source.args.get("use_distributed_optimizer")
    if was_split is not None and was_split != run.flags.parallel.use_distributed_optimizer:
        raise UserError(
            f"{source.folder} was saved with{'' if was_split else 'out'} "
            "--use-distributed-optimizer, and its optimizer state is of that kind: type the same, "
            "or leave it with --no-load-optim or --finetune.",
            CHECKPOINT,
        )
    parts, saved = run.optimizer.chained_optimizers, source.common.get("optimizer", {})
    if len(parts) > 1 and saved and 0 not in saved:
        raise UserError(
            f"{source.folder}: its optimizer state holds experts and other weights together, as "
            "megatron-core does without expert parallelism; leave it with --no-load-optim or "
            "--finetune.",
            CHECKPOINT,
        )


def _optimizer_state(run: Run, model_state: ShardedStateDict, *, is_loading: bool) -> Any:
    return run.optimizer.sharded_state_dict(
        {k: v for k, v in model_state.items() if k.startswith(("model", "distillation"))},
        is_loading=is_loading,
        metadata=OPTIMIZER_LAYOUT,
    )


def _rng_state(groups: ProcessGroupCollection) -> ShardedObject:
    """Return this rank's generators as Megatron-LM does.

    An object per (pipeline, tensor) rank; under expert parallelism, per data-parallel rank too.
    """
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": _tracked(get_cuda_rng_tracker().get_states(), graph_safe=False),
    }
    axes, replica = [groups.pp, groups.tp], groups.dp_cp.rank()
    if groups.ep.size() > 1:
        axes, replica = [*axes, groups.dp_cp], 0
    sizes, place = [group.size() for group in axes], [group.rank() for group in axes]
    return ShardedObject("rng_state", [state], tuple(sizes), tuple(place), replica_id=replica)


def _set_rng_state(loaded: list[dict[str, Any]]) -> None:
    (state,) = loaded
    random.setstate(state["random_rng_state"])
    numpy.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    if state["cuda_rng_state"].shape != torch.cuda.get_rng_state().shape:
        warn("the checkpoint was written on another kind of device: dropout begins anew.")
        return
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tracker = get_cuda_rng_tracker()
    graph_safe = is_graph_safe_cuda_rng_tracker(tracker)
    tracker.set_states(_tracked(state["rng_tracker_states"], graph_safe=graph_safe))


def _tracked(states: Mapping[str, Any], *, graph_safe: bool) -> dict[str, Any]:
    """Return the tracker's states as tensors, which a checkpoint holds, or as CUDA graphs need."""
    return {
        name: convert_cuda_rng_state(state, to_graphable=graph_safe)
        for name, state in states.items()
    }
