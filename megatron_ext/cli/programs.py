"""The command lines of the two programs, parsed and checked before any process group exists.

Here is what each program gets, and whether a model fits a layout; README.md says where the rest is.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

from megatron_ext.arch import Arch
from megatron_ext.arch.axes import axes_of
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
from megatron_ext.runtime.errors import USAGE, UserError

__all__ = [
    "OTHERS_IN_PRUNING",
    "OTHERS_IN_TRAINING",
    "ModelFlags",
    "PruneFlags",
    "TrainFlags",
    "check_against_checkpoint",
    "check_experts",
    "check_layout",
    "check_targets",
    "flags_as_dict",
    "format_flags",
    "measures",
    "megatron_command_line",
    "new_arch",
    "parse_prune",
    "parse_train",
    "pipeline_layout",
    "virtual_pipeline_size",
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


def virtual_pipeline_size(parallel: group.Parallel, num_layers: int) -> int | None:
    """Return the model pieces of each pipeline rank; None for one, the plain schedule."""
    pp, pieces = parallel.pipeline_model_parallel_size, 1
    if parallel.pipeline_model_parallel_layout:
        pieces = len(check.stages(parallel.pipeline_model_parallel_layout)) // pp
    elif parallel.num_virtual_stages_per_pipeline_rank:
        pieces = parallel.num_virtual_stages_per_pipeline_rank
    elif parallel.num_layers_per_virtual_pipeline_stage:
        pieces = num_layers // pp // parallel.num_layers_per_virtual_pipeline_stage
    return pieces if pieces > 1 else None


def pipeline_layout(parallel: group.Parallel, num_layers: int) -> str | None:
    """Return which layers each pipeline stage holds, where it is typed; None for as many each.

    Typed as a layout, or as the layers of the first and the last stage: the others share the rest.
    """
    first, last = (getattr(parallel, name) for name in check.ENDS)
    layout = parallel.pipeline_model_parallel_layout
    if layout is not None or (first is None and last is None):
        return layout
    inner = parallel.pipeline_model_parallel_size - (first is not None) - (last is not None)
    each = (num_layers - (first or 0) - (last or 0)) // max(inner, 1)
    counts = [first] * (first is not None) + [each] * inner + [last] * (last is not None)
    return check.layout_of_stages(counts)


def check_layout(arch: Arch, parallel: group.Parallel, *, seq_length: int) -> None:
    """Check that ``arch`` can be laid out as ``parallel`` says, for samples of ``seq_length``.

    Raises:
        UserError: with code ``USAGE``, naming both numbers and the flag.
    """
    check.refuse(
        _tensor_parallel_problems(arch, parallel.tensor_model_parallel_size),
        _pipeline_problems(arch.num_layers, parallel),
        _position_problems(arch, seq_length),
        _all_to_all_problems(arch, parallel),
        _expert_problems(arch, parallel) if arch.num_experts else (),
        _bert_problems(parallel, seq_length) if arch.is_bert else (),
    )


def check_experts(archs: Iterable[Arch], parallel: group.Parallel) -> None:
    """Check that a run with flags of experts has a model with experts.

    Raises:
        UserError: with code ``USAGE``.
    """
    if any(arch.num_experts for arch in archs):
        return
    names = ("expert_model_parallel_size", "moe_token_dispatcher_type", "moe_grouped_gemm")
    for name in (*names, "moe_router_dtype"):
        if getattr(parallel, name) != getattr(group.TrainParallel, name):
            raise UserError(f"{dashed(name)}: no model of this run has experts.", USAGE)


def check_targets(arch: Arch, targets: Iterable[Arch], prune: own.Prune) -> None:
    """Check that what ``prune`` asks for fits pruning ``arch`` to each of ``targets``.

    No layout enters: a plan is the same for any number of ranks, and the program that loads the
    pruned checkpoint checks it against its own layout.

    Raises:
        UserError: with code ``USAGE``, naming both numbers and the flag.
    """
    block, num_layers = prune.depth_block, arch.num_layers
    if block > 1 and block >= num_layers:
        problem = f"--depth-block {block}: the checkpoint has only {num_layers} layers."
        raise UserError(problem, USAGE)
    for target in targets:
        check.refuse(
            _residual_problems(arch, target, prune.head_residual),
            _sublayer_problems(prune)
            if target.is_hybrid
            else _depth_problems(num_layers, target.num_layers, prune),
        )


def _residual_problems(arch: Arch, target: Arch, head_residual: str) -> Iterator[str]:
    heads = target.num_attention_heads
    if head_residual != "none" and 2 * heads < arch.num_attention_heads:
        yield (
            f"--head-residual {head_residual} folds a pruned head into each kept one: "
            f"--target-num-attention-heads {heads} must be half of {arch.num_attention_heads} or "
            "more."
        )


def _depth_problems(num_layers: int, target: int, prune: own.Prune) -> Iterator[str]:
    block, cut = prune.depth_block, num_layers - target
    if prune.depth_rescore and cut % block:
        yield (
            f"--target-num-layers {target} removes {cut} of {num_layers} layers, not a multiple "
            f"of --depth-block {block}."
        )
    if not prune.depth_rescore and block > 1 and cut not in (0, block):
        yield (
            f"--target-num-layers {target} removes {cut} of {num_layers} layers, --depth-block "
            f"{block} at once; --depth-rescore removes one block after the other."
        )


def _sublayer_problems(prune: own.Prune) -> Iterator[str]:
    ones = "sub-layers are removed one by one, by scores that are measured once"
    if prune.depth_block > 1:
        yield f"--depth-block {prune.depth_block}: {ones}; leave it out."
    if prune.depth_rescore:
        yield f"--depth-rescore: {ones}; leave it out."


def _missing(options: Sequence[str]) -> Iterator[str]:
    if options:
        yield f"missing {', '.join(options)}."


def without_idle_sequence_parallel(parallel: Any) -> Any:
    """Return the layout without sequence parallelism where no tensor parallelism goes with it."""
    tp = parallel.tensor_model_parallel_size
    return replace(parallel, sequence_parallel=parallel.sequence_parallel and tp > 1)


def _expert_problems(arch: Arch, parallel: group.Parallel) -> Iterator[str]:
    ep, tp = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    if arch.num_experts % ep:
        yield f"--expert-model-parallel-size {ep} does not divide --num-experts {arch.num_experts}."
    if tp > 1 and not parallel.sequence_parallel:
        yield f"--tensor-model-parallel-size {tp} with experts needs --sequence-parallel."


def _bert_problems(parallel: group.Parallel, seq_length: int) -> Iterator[str]:
    if parallel.transformer_impl == "transformer_engine":
        yield "--transformer-impl transformer_engine: a BertModel has local layers here; use local."
    if seq_length < 3:
        yield f"--seq-length {seq_length}: [CLS] and [SEP] leave a BertModel no text; at least 3."


def _tensor_parallel_problems(arch: Arch, tp: int) -> Iterator[str]:
    sizes = {
        dashed(size.name): getattr(arch, size.name)
        for axis in axes_of(arch)
        if axis.tp_split
        for size in axis.sizes
    }
    padded = "the padded vocabulary (--make-vocab-size-divisible-by)"
    sizes[padded] = arch.padded_vocab_size
    allowed = [
        str(ranks)
        for ranks in range(1, min(sizes.values()) + 1)
        if not any(size % ranks for size in sizes.values())
    ]
    for name, size in sizes.items():
        if size % tp:
            yield (
                f"--tensor-model-parallel-size {tp} does not divide {name}, {size}; this model "
                f"allows {', '.join(allowed)}."
            )


def _pipeline_problems(num_layers: int, parallel: group.Parallel) -> Iterator[str]:
    pp, layout = parallel.pipeline_model_parallel_size, pipeline_layout(parallel, num_layers)
    ends = {dashed(name): getattr(parallel, name) for name in check.ENDS}
    typed = " ".join(f"{name} {value}" for name, value in ends.items() if value is not None)
    if layout is not None:
        placed = "".join(check.stages(layout)).count("t")
        if typed and placed != num_layers:
            yield (
                f"{typed}: the other layers of {num_layers} cannot be shared evenly by the other "
                f"stages of --pipeline-model-parallel-size {pp}."
            )
        elif placed != num_layers:
            yield (
                f"--pipeline-model-parallel-layout {layout} places {placed} layers; the model has "
                f"{num_layers}."
            )
        return
    if num_layers % pp:
        yield (
            f"{num_layers} layers are not a multiple of --pipeline-model-parallel-size {pp}: place "
            "them with --pipeline-model-parallel-layout."
        )
    per_stage = num_layers // pp
    for name in ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"):
        value = getattr(parallel, name)
        if value is not None and per_stage % value:
            yield (
                f"{dashed(name)} {value} does not divide the {per_stage} layers of a "
                f"pipeline stage ({num_layers} / {pp})."
            )


def _all_to_all_problems(arch: Arch, parallel: group.Parallel) -> Iterator[str]:
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    groups = arch.num_query_groups // tp
    if parallel.cp_comm_type == "a2a" and groups % cp:
        yield (
            f"--cp-comm-type a2a: --context-parallel-size {cp} does not divide the {groups} query "
            "groups of a tensor-parallel rank; use p2p."
        )


def _position_problems(arch: Arch, seq_length: int) -> Iterator[str]:
    if seq_length > arch.max_position_embeddings:
        yield (
            f"--seq-length {seq_length} is longer than --max-position-embeddings "
            f"{arch.max_position_embeddings}."
        )
    rotary = int(arch.kv_channels * arch.rotary_percent)
    if arch.position_embedding_type == "rope" and (rotary == 0 or rotary % 2):
        yield (
            f"--kv-channels {arch.kv_channels} x --rotary-percent {arch.rotary_percent} = {rotary} "
            "channels rotate; rope turns pairs, so it must be an even number above 0."
        )
