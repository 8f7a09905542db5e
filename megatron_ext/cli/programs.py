"""The command lines of the two programs, parsed and checked before any process group exists.

Here is what each program gets; README.md says where the rest is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

from megatron_ext.cli import flag_checks as check
from megatron_ext.cli import megatron_flags as group
from megatron_ext.cli import method_flags as own
from megatron_ext.cli.data_args import with_data_args
from megatron_ext.cli.flags_without_effect import WITHOUT_EFFECT
from megatron_ext.cli.log_flags import Log, Profile
from megatron_ext.cli.modelopt_yaml import read_kd_cfg
from megatron_ext.cli.option_rows import Option, options
from megatron_ext.cli.parser import (
    all_options,
    build,
    dashed,
    flags_as_dict,
    format_flags,
    groups,
    missing,
    options_of,
    read,
)
from megatron_ext.cli.refused_flags import REFUSED, REFUSED_IN_TRAINING
from megatron_ext.cli.size_flags import (
    Sizes,
    check_against_checkpoint,
    megatron_command_line,
    missing_sizes,
    new_arch,
)
from megatron_ext.model import cuda_graphs, fp8, tp_overlap

__all__ = [
    "OTHERS_IN_PRUNING",
    "OTHERS_IN_TRAINING",
    "ModelFlags",
    "PruneFlags",
    "TrainFlags",
    "check_against_checkpoint",
    "flags_as_dict",
    "format_flags",
    "measures",
    "megatron_command_line",
    "new_arch",
    "parse_prune",
    "parse_train",
]


class ModelFlags(Protocol):
    """The flags of any program that runs a model under a layout."""

    @property
    def parallel(self) -> group.Parallel:
        """Layout and kernels."""

    @property
    def batch(self) -> group.Batch:
        """Sizes of a step, and the seed."""

    @property
    def precision(self) -> group.Precision:
        """Precision of weights and activations."""


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Train a model alone, or distil it from a teacher (--teacher-load)."""

    sizes: Annotated[dict[str, Any], Sizes]
    """Typed sizes only: a checkpoint supplies the others, or ``new_arch`` its defaults."""
    parallel: group.TrainParallel
    batch: group.TrainBatch
    optimizer: group.Optimizer
    precision: group.TrainPrecision
    fp8: fp8.Fp8
    graphs: cuda_graphs.Graphs
    overlap: tp_overlap.TpOverlap
    data: group.TrainData
    checkpoint: group.TrainCheckpoint
    log: Log
    profile: Profile
    distill: own.Distill
    dry: own.TrainDryRun


@dataclass(frozen=True, kw_only=True)
class PruneFlags:
    """Prune a checkpoint: scores, plan, cut. The model's sizes come from the checkpoint."""

    sizes: Annotated[dict[str, Any], Sizes]
    """Typed sizes only, which the checkpoint must have too."""
    parallel: group.Parallel
    batch: group.Batch
    precision: group.Precision
    data: group.Data
    checkpoint: group.Checkpoint
    prune: own.Prune
    dry: own.DryRun


# Why a training flag is none of pruning, by group. What would change scores is refused.
OF_TRAINING_ONLY = {
    "parallel": "scores do not depend on it",
    "batch": "nothing is trained",
    "optimizer": "nothing is trained",
    "precision": "nothing is trained",
    "graphs": "scores are measured without it",
    "overlap": "scores are measured without it",
    "data": "scores are measured on the training split, over all of its tokens",
    "checkpoint": "nothing is trained, and what is pruned is written once",
    "log": "nothing is trained",
    "profile": "nothing is trained",
}


def _others_in_pruning() -> dict[str, Option]:
    trained, pruned = groups(TrainFlags), set(all_options(PruneFlags))
    found = {}
    for name, reason in OF_TRAINING_ONLY.items():
        found |= options_of(trained[name], reason)
    found |= options_of(
        trained["fp8"], "scores are measured in --bf16 or float32; leave it out", refused=True
    )
    untrained = [("nothing is trained", words) for _, words in REFUSED_IN_TRAINING]
    found |= options([*WITHOUT_EFFECT, *untrained]) | options(REFUSED, refused=True)
    return {name: option for name, option in found.items() if name not in pruned}


OTHERS_IN_TRAINING = options(WITHOUT_EFFECT) | options(
    [*REFUSED, *REFUSED_IN_TRAINING], refused=True
)
OTHERS_IN_PRUNING = _others_in_pruning()


def parse_train(argv: Sequence[str], world_size: int) -> TrainFlags:
    """Return the checked flags of ``pretrain_distill.py`` on ``world_size`` ranks.

    A dry run is of --world-size ranks. As in Megatron-LM, a global batch size that was not typed is
    filled in, and sequence parallelism without tensor parallelism is off.

    Raises:
        UserError: with code ``USAGE``, for the first problem; missing flags all at once.
    """
    typed = read(TrainFlags, argv, OTHERS_IN_TRAINING)
    if "export_kd_cfg" in typed:
        typed = read_kd_cfg(typed["export_kd_cfg"]) | typed
    training = not typed.get("skip_train")
    needed = missing(TrainFlags, typed)
    if training:
        length = "train_samples" if "train_samples" in typed else "train_iters"
        needed += [dashed(name) for name in (length, "lr") if name not in typed]
    if not {"load", "pretrained_checkpoint", "load_config"} & typed.keys():
        needed += missing_sizes(typed)
    check.refuse(_missing(needed))

    flags = build(TrainFlags, typed)
    check.refuse(check.dry_run_problems(flags.dry), check.data_args_problems(flags.data))
    world_size = flags.dry.world_size or world_size
    parallel, batch, data = flags.parallel, flags.batch, with_data_args(flags.data)
    check.refuse(
        check.layout_problems(parallel, batch.seq_length, world_size),
        check.virtual_stage_problems(parallel),
    )
    dp = world_size // check.model_parallel_size(parallel)
    batch_size = batch.global_batch_size or batch.micro_batch_size * dp
    batch = replace(batch, global_batch_size=batch_size)
    check.refuse(
        check.length_problems(batch, flags.optimizer),
        check.optimizer_problems(flags.optimizer, flags.parallel),
        check.batch_problems(batch, parallel, dp),
    )
    if batch.train_samples is not None:
        batch = replace(batch, train_iters=batch.train_samples // batch_size)
    check.refuse(
        check.schedule_problems(flags.optimizer, batch) if training else (),
        check.precision_problems(flags.precision),
        check.training_precision_problems(flags.precision),
        fp8.problems(
            flags.fp8,
            bf16=flags.precision.bf16,
            distributed=parallel.use_distributed_optimizer,
            has_teacher=flags.distill.teacher_load is not None,
        ),
        cuda_graphs.problems(flags.graphs, flags),
        tp_overlap.problems(flags.overlap, parallel),
        check.model_problems(flags.sizes),
        check.checkpoint_problems(flags.checkpoint, training=training),
        check.distill_problems(flags.distill, flags.precision),
        check.log_problems(flags.log, flags.profile, flags.checkpoint),
        check.data_problems(data),
    )
    parallel = without_idle_sequence_parallel(parallel)
    return replace(flags, parallel=parallel, batch=batch, data=data)


def parse_prune(argv: Sequence[str], world_size: int) -> PruneFlags:
    """Return the checked flags of ``prune.py`` on ``world_size`` ranks, or a dry run's own.

    Raises:
        UserError: with code ``USAGE``, for the first problem; missing flags all at once.
    """
    typed = read(PruneFlags, argv, OTHERS_IN_PRUNING)
    check.refuse(_missing(missing(PruneFlags, typed) + ["--load"] * ("load" not in typed)))
    flags = build(PruneFlags, typed)
    check.refuse(check.dry_run_problems(flags.dry))
    world_size = flags.dry.world_size or world_size
    check.refuse(check.data_args_problems(flags.data))
    flags = replace(flags, data=with_data_args(flags.data))
    check.refuse(
        check.layout_problems(flags.parallel, flags.batch.seq_length, world_size),
        check.virtual_stage_problems(flags.parallel),
        check.precision_problems(flags.precision),
        check.prune_problems(flags.checkpoint, flags.prune),
        check.data_problems(flags.data, needed=measures(flags.checkpoint, flags.prune)),
    )
    return replace(flags, parallel=without_idle_sequence_parallel(flags.parallel))


def measures(checkpoint: group.Checkpoint, prune: own.Prune) -> bool:
    """Whether ``prune.py`` reads data: no plan is there, nor scores that are not measured again."""
    given = [prune.plan] + [prune.scores] * (prune.prune_iterations == 1)
    return (
        prune.importance == "activation"
        and any((checkpoint.save, prune.scores, prune.plan))
        and not any(path is not None and Path(path).exists() for path in given)
    )


def _missing(options: Sequence[str]) -> Iterator[str]:
    if options:
        yield f"missing {', '.join(options)}."


def without_idle_sequence_parallel(parallel: Any) -> Any:
    """Return the layout without sequence parallelism where no tensor parallelism goes with it."""
    tp = parallel.tensor_model_parallel_size
    return replace(parallel, sequence_parallel=parallel.sequence_parallel and tp > 1)
