"""Settings of a distillation, from the flags, checked against the two models."""

from dataclasses import replace

from megatron_ext.arch import Arch
from megatron_ext.checkpoint.folder import Checkpoint
from megatron_ext.checkpoint.identity import check_comparable, padded_alike, tokenizer_sha256
from megatron_ext.cli.fit import check_documents, check_experts, check_layout
from megatron_ext.cli.megatron_flags import Parallel
from megatron_ext.cli.programs import TrainFlags
from megatron_ext.distillation.pairs import MLP, WITHIN, HiddenStates, Pair, parse_pairs
from megatron_ext.distillation.placement import layouts_of_both
from megatron_ext.distillation.store_index import check_store, read_index
from megatron_ext.model import cuda_graphs, fp8
from megatron_ext.pruning.plan import load_plan
from megatron_ext.runtime.errors import USAGE, UserError


def plan_layouts(
    flags: TrainFlags, arch: Arch, teacher: Arch | None, *, has_weights: bool
) -> tuple[TrainFlags, Parallel]:
    """Return the flags with the layout of the model, and the layout of its teacher. Pure.

    Args:
        flags: of the run.
        arch: sizes of the model that is trained.
        teacher: sizes of the other, if there is one.
        has_weights: the model begins with those of a checkpoint.

    Raises:
        UserError: this layout cannot hold them, FP8 not run them, or these losses not compare them.
    """
    parallel = flags.parallel
    if teacher is not None:
        named = pairs(flags, arch, teacher)
        depths = arch.num_layers, teacher.num_layers
        own, parallel = layouts_of_both(flags.parallel, *depths, named)
        flags = replace(flags, parallel=own)
    check_layout(arch, flags.parallel, seq_length=flags.batch.seq_length)
    if teacher is not None:
        check_teacher(arch, teacher, flags, parallel)
    archs = [arch, *([teacher] if teacher else [])]
    check_experts(archs, flags.parallel)
    check_documents(archs, flags.data)
    fp8.check_models(
        flags.fp8,
        arch,
        teacher and padded_alike(teacher, arch),
        flags.parallel,
        tokens=flags.batch.micro_batch_size * flags.batch.seq_length,
        has_weights=has_weights,
    )
    cuda_graphs.check_models(flags.graphs, arch, teacher)
    return flags, parallel


def check_teacher(arch: Arch, teacher: Arch, flags: TrainFlags, parallel: Parallel) -> None:
    """Refuse a teacher that this layout cannot hold, or these losses compare, with the student."""
    check_comparable(arch, teacher)
    top_k = flags.distill.kd_top_k
    if top_k is not None and top_k > arch.vocab_size:
        raise UserError(f"--kd-top-k {top_k}: the vocabulary has {arch.vocab_size} tokens.", USAGE)
    check_layout(padded_alike(teacher, arch), parallel, seq_length=flags.batch.seq_length)


def check_stored_teacher(flags: TrainFlags, vocab_size: int) -> None:
    """Refuse what was stored for other settings than this run's."""
    check_store(
        read_index(flags.distill.kd_teacher_store),
        top_k=flags.distill.kd_top_k,
        temperature=flags.distill.kd_temperature,
        vocab_size=vocab_size,
        seq_length=flags.batch.seq_length,
        tokenizer_sha256=tokenizer_sha256(flags.data),
    )


def pairs(flags: TrainFlags, student: Arch, teacher: Arch) -> tuple[Pair, ...]:
    """Return the pairs of states that --kd-hidden-states names.

    Raises:
        UserError: it is no list of pairs, or names a layer that is not there.
    """
    text = flags.distill.kd_hidden_states
    if text is None:
        return ()
    try:
        named = parse_pairs(text, last=(teacher.num_layers - 1, student.num_layers - 1))
    except ValueError as error:
        raise UserError(f"--kd-hidden-states {text}: {error}.", USAGE) from error
    for pair in named:
        for who, layer, arch in (
            ("teacher", pair.teacher, teacher),
            ("student", pair.student, student),
        ):
            if layer is not None and layer >= arch.num_layers:
                raise UserError(
                    f"--kd-hidden-states {pair}: the {who} has layers 0 to {arch.num_layers - 1}.",
                    USAGE,
                )
            within = [arch.layers_of(kind) for kind in WITHIN.get(pair.kind, ())]
            if within and not any(layer in layers for layers in within):
                raise UserError(
                    f"--kd-hidden-states {pair}: layer {layer} of the {who} is no {pair.kind}; its "
                    f"sub-layers are {arch.pattern}.",
                    USAGE,
                )
    runs_twice = "layernorm" in flags.batch.recompute_modules
    if runs_twice and any(pair.kind == MLP for pair in named):
        raise UserError(
            f"--kd-hidden-states {text} with --recompute-modules layernorm: norms that run twice "
            "would count twice; leave layernorm out.",
            USAGE,
        )
    if flags.batch.recompute_granularity == "full" and flags.fp8.fp8_format:
        # Transformer Engine runs the layers again then, not megatron-core.
        raise UserError(
            "--kd-hidden-states with --recompute-granularity full and --fp8-format has not been "
            "tried: use selective.",
            USAGE,
        )
    return named


def hidden_states(
    flags: TrainFlags, student: Arch, teacher: Arch, source: Checkpoint | None
) -> HiddenStates | None:
    """Return which hidden states are compared, or None. No collectives.

    Args:
        flags: of the run.
        student: sizes of the model that is trained.
        teacher: sizes of the other.
        source: where the student's weights come from; None for random ones.

    Raises:
        UserError: as ``pairs``.
    """
    named = pairs(flags, student, teacher)
    if not named:
        return None
    return HiddenStates(
        pairs=named,
        loss=flags.distill.kd_hidden_loss,
        projection=flags.distill.kd_projection,
        kept_channels=kept_channels(source, student, teacher),
    )


def kept_channels(
    source: Checkpoint | None, student: Arch, teacher: Arch
) -> tuple[int, ...] | None:
    """Return the teacher's channels that the student kept, from the plan beside its weights."""
    path = source.folder / "plan.json" if source else None
    if path is None or not path.exists():
        return None
    plan = load_plan(path)
    sizes = plan.source.hidden_size, plan.target.hidden_size
    return plan.kept["hidden"] if sizes == (teacher.hidden_size, student.hidden_size) else None
