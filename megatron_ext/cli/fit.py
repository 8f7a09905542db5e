"""Whether a model fits a layout, and pruning targets their model: sizes against flags. Pure."""

from collections.abc import Iterable, Iterator

from megatron_ext.arch import Arch
from megatron_ext.arch.axes import axes_of
from megatron_ext.arch.mamba import num_heads
from megatron_ext.arch.rotary import KINDS as ROTARY
from megatron_ext.cli import flag_checks as check
from megatron_ext.cli import megatron_flags as group
from megatron_ext.cli import method_flags as own
from megatron_ext.cli.parser import dashed
from megatron_ext.runtime.errors import USAGE, UserError


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
        _mamba_problems(arch, parallel) if arch.mamba_layers else (),
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


def check_documents(archs: Iterable[Arch], data: group.Data) -> None:
    """Check that no model of a run would see across documents that --reset-attention-mask parts.

    Raises:
        UserError: with code ``USAGE``.
    """
    if data.reset_attention_mask and any(arch.mamba_layers for arch in archs):
        raise UserError(
            "--reset-attention-mask: no mask stops the states of Mamba at the end of a document; "
            "leave it out.",
            USAGE,
        )


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
            _iteration_problems(arch, target, prune.prune_iterations),
            _residual_problems(arch, target, prune.head_residual),
            _sublayer_problems(prune)
            if target.is_hybrid
            else _depth_problems(num_layers, target.num_layers, prune),
        )


def _iteration_problems(arch: Arch, target: Arch, iterations: int) -> Iterator[str]:
    if iterations > 1 and (arch.by_layer or target.by_layer):
        yield (
            f"--prune-iterations {iterations}: sizes that differ from layer to layer are pruned to "
            "in one; leave it out."
        )


def _residual_problems(arch: Arch, target: Arch, head_residual: str) -> Iterator[str]:
    before = arch.values("num_attention_heads")
    heads = min(target.values("num_attention_heads"))
    # Where layers of the checkpoint differ, the plan finds it out.
    if head_residual != "none" and 2 * heads < min(before):
        yield (
            f"--head-residual {head_residual} folds a pruned head into each kept one: "
            f"--target-num-attention-heads {heads} must be half of {min(before)} or more."
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
    sizes = [
        (dashed(size.name), value)
        for axis in axes_of(arch)
        if axis.tp_split
        for size in axis.sizes
        for value in dict.fromkeys(arch.values(size.name))
    ]
    padded = "the padded vocabulary (--make-vocab-size-divisible-by)"
    sizes.append((padded, arch.padded_vocab_size))
    allowed = [
        str(ranks)
        for ranks in range(1, min(size for _, size in sizes) + 1)
        if not any(size % ranks for _, size in sizes)
    ]
    for name, size in sizes:
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
    for held in sorted({number // tp for number in arch.values("num_query_groups")}):
        if parallel.cp_comm_type == "a2a" and held % cp:
            yield (
                f"--cp-comm-type a2a: --context-parallel-size {cp} does not divide the {held} "
                "query groups of a tensor-parallel rank; use p2p."
            )


def _mamba_problems(arch: Arch, parallel: group.Parallel) -> Iterator[str]:
    """Yield why context-parallel ranks cannot share the heads of a tensor-parallel rank."""
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    heads, groups = num_heads(arch) // tp, arch.mamba_num_groups // tp
    if heads % cp:
        yield (
            f"--context-parallel-size {cp} does not divide the {heads} Mamba heads of a "
            "tensor-parallel rank."
        )
    elif groups and groups % cp and cp % groups:
        yield (
            f"--context-parallel-size {cp}: the {groups} groups of Mamba heads of a "
            "tensor-parallel rank must be a multiple or a divisor of it."
        )


def _position_problems(arch: Arch, seq_length: int) -> Iterator[str]:
    if seq_length > arch.max_position_embeddings:
        yield (
            f"--seq-length {seq_length} is longer than --max-position-embeddings "
            f"{arch.max_position_embeddings}."
        )
    rotary = int(arch.kv_channels * arch.rotary_percent)
    if arch.position_embedding_type in ROTARY and (rotary == 0 or rotary % 2):
        yield (
            f"--kv-channels {arch.kv_channels} x --rotary-percent {arch.rotary_percent} = {rotary} "
            "channels rotate; rope turns pairs, so it must be an even number above 0."
        )
