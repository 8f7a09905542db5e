"""From the flags of a run to the small runs that are compared: one rank first, then layouts. Pure.

The reference leaves out whatever should change nothing: ranks, recomputation, fused output, overlap
and the distributed optimizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from megatron_ext.arch import Arch
from megatron_ext.arch.axes import sizes_of
from megatron_ext.certify.layouts import Ranks, envelope, ranks_of, small_layouts
from megatron_ext.certify.shrink import (
    KEPT_TOP_K,
    not_on_cpu,
    serial,
    small_arch,
    small_batch,
    small_depths,
    small_pairs,
    small_parallel,
    small_stages,
    small_target,
)
from megatron_ext.cli.fit import check_layout, pipeline_layout, virtual_pipeline_size
from megatron_ext.cli.flag_checks import stages
from megatron_ext.cli.megatron_flags import Optimizer, Parallel
from megatron_ext.cli.parser import dashed, option
from megatron_ext.cli.programs import PruneFlags, TrainFlags
from megatron_ext.distillation import settings
from megatron_ext.runtime.errors import USAGE, UserError

# Adam with an epsilon far above every gradient: a step of lr = epsilon takes off the gradient.
EPSILON = 1e6
NO_CLIPPING = 1e9  # the norm is computed, and never above
STEP = Optimizer(
    lr=EPSILON,
    adam_eps=EPSILON,
    lr_decay_style="constant",
    weight_decay=0.0,
    clip_grad=NO_CLIPPING,
)
GPU_GROUPS = ("precision", "fp8", "graphs", "overlap")
NEED_ENGINE = ("layernorm", "moe_act")
"""Recomputation that only layers of Transformer Engine offer."""


def in_words(ranks: Ranks, virtual: int | None, parallel: Parallel) -> str:
    """Return ``8 ranks = TP 2 x PP 4, 2 virtual stages, sequence parallel``."""
    stages_text = f", {virtual} virtual stages" * ((virtual or 1) > 1)
    sequence = ", sequence parallel" * parallel.sequence_parallel
    return f"{ranks.total} ranks = {ranks}{stages_text}{sequence}"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One small run."""

    ranks: Ranks
    flags: Any
    """``TrainFlags`` or ``PruneFlags``, checked."""
    arch: Arch
    """Sizes of the student, or of the model that is scored."""
    teacher: Arch | None = None
    teacher_parallel: Parallel | None = None
    targets: tuple[Arch, ...] = ()

    @property
    def name(self) -> str:
        """The layout in words."""
        virtual = virtual_pipeline_size(self.flags.parallel, self.arch.num_layers)
        return in_words(self.ranks, virtual, self.flags.parallel)


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Runs in small that are compared, and the flags of the real run that they leave out."""

    real: str
    """The run's layout in words."""
    reference: Trial
    layouts: tuple[Trial, ...]
    left_out: tuple[str, ...]
    """Flags of the run that a CPU does not know or that no comparison needs."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Real and small layout of a run."""

    real: Ranks
    layouts: tuple[Ranks, ...]
    small: Ranks
    """The largest of each size in ``layouts``: what the small model must be divided by."""
    virtual: int
    """Model pieces of a pipeline rank in the run."""
    pieces: int
    """The same in small."""


def cut_of(parallel: Parallel, num_layers: int, world_size: int, max_ranks: int) -> Cut:
    """Return the small layouts of ``parallel``, in which a model has ``num_layers``."""
    real = ranks_of(parallel, world_size)
    layouts = tuple(small_layouts(real, max_ranks))
    small = envelope(layouts)
    virtual = virtual_pipeline_size(parallel, num_layers) or 1
    pieces = min(virtual, 2) if small.pp > 1 else 1
    return Cut(real=real, layouts=layouts, small=small, virtual=virtual, pieces=pieces)


def _check_whole(archs: Sequence[Arch]) -> None:
    """Refuse what does not shrink to a few layers that are alike."""
    for arch in archs:
        if arch.is_hybrid:
            raise UserError(
                f"a model of sub-layers ({arch.pattern}) has no form in small here: certify the "
                "layout with a run of whole layers.",
                USAGE,
            )


def of_training(
    flags: TrainFlags, student: Arch, teacher: Arch | None, world_size: int, max_ranks: int
) -> Trials:
    """Return the trials of a training run.

    Raises:
        UserError: the run's own layout cannot hold these models.
    """
    _check_whole([student, *([teacher] if teacher else [])])
    placed, _ = settings.plan_layouts(flags, student, teacher, has_weights=False)
    cut = cut_of(placed.parallel, student.num_layers, world_size, max_ranks)
    archs = [student, *([teacher] if teacher else [])]
    layout, depths = _stages(flags.parallel, archs, cut)
    pairs = settings.pairs(flags, student, teacher) if teacher else ()
    named = small_pairs(pairs, [arch.num_layers for arch in archs], depths)
    kept = _small_training(flags, cut, named)
    runs = [(Ranks(), _plain(kept))]
    runs += [
        (ranks, replace(kept, parallel=small_parallel(flags.parallel, ranks, layout, cut.pieces)))
        for ranks in cut.layouts
    ]
    small = [
        small_arch(arch, cut.real, cut.small, depth)
        for arch, depth in zip(archs, depths, strict=True)
    ]
    reference, *others = (_training_trial(ranks, each, *small) for ranks, each in runs)
    left = left_out(flags, kept.batch)
    return Trials(
        real=in_words(cut.real, cut.virtual, flags.parallel),
        reference=reference,
        layouts=tuple(others),
        left_out=left,
    )


def _small_training(flags: TrainFlags, cut: Cut, pairs: str | None) -> TrainFlags:
    """Return ``flags`` in small but for the layout; ``pairs`` as --kd-hidden-states."""
    batch, samples = small_batch(
        flags.batch,
        cut.real,
        cut.small,
        interleaved=cut.virtual > 1,
        samples=flags.batch.global_batch_size,
    )
    batch = replace(
        batch,
        global_batch_size=samples,
        train_iters=1,
        train_samples=None,
        skip_train=False,
        recompute_num_layers=batch.recompute_num_layers and 1,
        recompute_modules=tuple(
            name for name in batch.recompute_modules if name not in NEED_ENGINE
        ),
    )
    top_k = flags.distill.kd_top_k
    return replace(
        flags,
        sizes={},
        batch=batch,
        distill=replace(
            flags.distill,
            kd_hidden_states=pairs,
            kd_top_k=top_k and min(top_k, KEPT_TOP_K),
        ),
        data=replace(flags.data, num_workers=0),
        optimizer=STEP,
        **{name: type(getattr(flags, name))() for name in GPU_GROUPS},
    )


def _plain(kept: TrainFlags) -> TrainFlags:
    """Return the flags of the reference."""
    batch = replace(
        kept.batch,
        recompute_granularity=None,
        recompute_method=None,
        recompute_num_layers=None,
        recompute_modules=(),
    )
    return replace(
        kept,
        parallel=serial(kept.parallel),
        batch=batch,
        distill=replace(kept.distill, kd_fused_output=False),
    )


def _training_trial(
    ranks: Ranks, flags: TrainFlags, student: Arch, teacher: Arch | None = None
) -> Trial:
    flags, parallel = settings.plan_layouts(flags, student, teacher, has_weights=False)
    return Trial(ranks=ranks, flags=flags, arch=student, teacher=teacher, teacher_parallel=parallel)


def _stages(
    parallel: Parallel, archs: Sequence[Arch], cut: Cut, at_least: int = 0
) -> tuple[str | None, list[int]]:
    """Return the typed layout of the stages in small, and the layers of each of ``archs``."""
    typed, layout = pipeline_layout(parallel, archs[0].num_layers), None
    num_stages, placed = cut.small.pp * cut.pieces, {}
    if typed is not None:
        layout = small_stages(typed, num_stages)
        placed = {sum(s.count("t") for s in stages(typed)): layout.count("t")}
    depths = [arch.num_layers for arch in archs]
    real_stages = cut.real.pp * cut.virtual
    return layout, small_depths(depths, placed, real_stages, num_stages, at_least)


def of_pruning(
    flags: PruneFlags, source: Arch, targets: Sequence[Arch], world_size: int, max_ranks: int
) -> Trials:
    """Return the trials of a pruning run that measures activations.

    Raises:
        UserError: the run's own layout cannot hold the model.
    """
    _check_whole([source, *targets])
    check_layout(source, flags.parallel, seq_length=flags.batch.seq_length)
    cut = cut_of(flags.parallel, source.num_layers, world_size, max_ranks)
    layout, (depth,) = _stages(flags.parallel, [source], cut, at_least=4)
    arch = small_arch(source, cut.real, cut.small, depth)
    kept, removed = _small_pruning(flags, cut), min(flags.prune.depth_block, 2)
    left = [depth - removed * (target.num_layers < source.num_layers) for target in targets]
    small = tuple(
        dict.fromkeys(
            small_target(source, target, arch, layers)
            for target, layers in zip(targets, left, strict=True)
        )
    )
    runs = [(Ranks(), serial(flags.parallel))]
    runs += [
        (ranks, small_parallel(flags.parallel, ranks, layout, cut.pieces)) for ranks in cut.layouts
    ]
    trials = []
    for ranks, parallel in runs:
        check_layout(arch, parallel, seq_length=kept.batch.seq_length)
        each = replace(kept, parallel=parallel)
        trials.append(Trial(ranks=ranks, flags=each, arch=arch, targets=small))
    reference, *others = trials
    iterations = flags.prune.prune_iterations
    first_only = (f"--prune-iterations {iterations} (all but the first)",) * (iterations > 1)
    return Trials(
        real=in_words(cut.real, cut.virtual, flags.parallel),
        reference=reference,
        layouts=tuple(others),
        left_out=left_out(flags, kept.batch) + first_only,
    )


def _small_pruning(flags: PruneFlags, cut: Cut) -> PruneFlags:
    """Return ``flags`` in small but for the layout."""
    batch, samples = small_batch(
        flags.batch,
        cut.real,
        cut.small,
        interleaved=cut.virtual > 1,
        samples=flags.prune.calibration_samples,
    )
    prune = replace(
        flags.prune,
        calibration_samples=samples,
        depth_block=min(flags.prune.depth_block, 2),
        prune_iterations=1,
        scores=None,
        plan=None,
    )
    return replace(flags, batch=batch, prune=prune, precision=type(flags.precision)())


def left_out(flags: Any, batch: Any) -> tuple[str, ...]:
    """Return the flags as typed that no trial has: kernels, precision, graphs.

    ``batch``: what the trials have of its group.
    """
    names = {id(flags.parallel): [*not_on_cpu(flags.parallel), "transformer_impl"]}
    groups = [getattr(flags, name) for name in ("parallel", *GPU_GROUPS) if hasattr(flags, name)]
    found = [
        option(f) if isinstance(f.default, bool) else f"{dashed(f.name)} {getattr(group, f.name)}"
        for group in groups
        for f in fields(group)
        if f.name in names.get(id(group), [f.name]) and getattr(group, f.name) != f.default
    ]
    before, after = (set(getattr(b, "recompute_modules", ())) for b in (flags.batch, batch))
    return tuple(found) + tuple(f"--recompute-modules {name}" for name in sorted(before - after))


def sizes_in_words(before: Arch, after: Arch) -> str:
    """Return what became smaller: ``num_layers 32 -> 2, ...``."""
    names = (*sizes_of(before), "kv_channels")
    sizes = {name: (getattr(before, name), getattr(after, name)) for name in names}
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in sizes.items() if old != new)
