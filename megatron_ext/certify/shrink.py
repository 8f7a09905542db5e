"""A small model, batch and flags that keep what a layout can get wrong. Pure.

Kept: query heads to query groups, query groups to tensor-parallel ranks (one each or several),
width of the heads together to hidden_size, experts to their ranks and top-k, even and uneven
stages, one or several layers, micro-batches and samples of each, tied embeddings, padding of the
vocabulary, norms, activations, biases, losses, pairs of hidden states. Lost: size, and dropout,
which no two layouts draw alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from megatron_ext.arch import Arch
from megatron_ext.arch.axes import sizes_of
from megatron_ext.certify.layouts import Ranks
from megatron_ext.cli.flag_checks import ENDS, stages
from megatron_ext.distillation.pairs import Pair

POSITIONS, TOKENS = 16, 48
"""Least number of tokens of a sample, and of the vocabulary."""
WINDOW = 5
"""Most tokens before its own that a query looks at, where there is a window."""
KEPT_EXPERTS, KEPT_TOP_K = 16, 8
"""Above these, fewer."""


def up_to_multiple(value: float, of: int) -> int:
    """Return the smallest multiple of ``of`` that is not below ``value``, at least ``of``."""
    return max(1, -(-int(value) // of)) * of


def small_arch(arch: Arch, real: Ranks, small: Ranks, num_layers: int) -> Arch:
    """Return ``arch`` in small, with ``num_layers``, for the layout ``small`` of ``real``.

    Everything that is not a size stays. Sizes of other models shrink by the same factor.
    """
    groups = small.tp * min(2, arch.num_query_groups // real.tp)
    heads = arch.num_attention_heads // arch.num_query_groups * groups
    kv_channels = _kv_channels(arch)
    factor = heads * kv_channels / (arch.num_attention_heads * arch.kv_channels)
    padded = up_to_multiple(TOKENS, small.tp)
    sizes = {
        "num_layers": num_layers,
        "hidden_size": up_to_multiple(arch.hidden_size * factor, 2),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": kv_channels,
        "max_position_embeddings": seq_length(small),
        "vocab_size": padded - 5 * (arch.padded_vocab_size > arch.vocab_size),
        "padded_vocab_size": padded,
        "init_method_std": 0.1,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    for name in ("ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        if getattr(arch, name) is not None:
            sizes[name] = up_to_multiple(getattr(arch, name) * factor, small.tp)
    if arch.num_experts is not None:
        sizes["num_experts"] = _num_experts(arch, real.ep, small.ep)
    if arch.window is not None:
        sizes["window_size"] = f"{min(arch.window, WINDOW)},0"
    layers = [layer % arch.num_layers for layer in range(num_layers)]
    return replace(arch.with_layers(layers), **sizes)


def _kv_channels(arch: Arch) -> int:
    """Return few channels of a head, of which as whole a number of pairs rotates as of many."""
    for channels in (8, 16, 32, 64):
        rotary = int(channels * arch.rotary_percent)
        if rotary and rotary % 2 == 0:
            return channels
    return arch.kv_channels


def _num_experts(arch: Arch, real_ep: int, ep: int) -> int:
    if arch.num_experts <= KEPT_EXPERTS and arch.num_experts % ep == 0:
        return arch.num_experts
    least = max(2 * arch.moe_router_topk, 2 if arch.num_experts > real_ep else 1)
    return up_to_multiple(least, ep)


def seq_length(small: Ranks) -> int:
    """Return positions that context and sequence parallelism divide."""
    return up_to_multiple(POSITIONS, 2 * small.cp * small.tp)


def small_stages(layout: str, num_stages: int) -> str:
    """Return a typed pipeline layout in ``num_stages``: its first, its last, some in between.

    Of the layers of a stage two stay, one where it has fewer than another.
    """
    parts = stages(layout)
    last = len(parts) - 1
    chosen = [parts[round(i * last / max(1, num_stages - 1))] for i in range(num_stages)]
    fewest = min(part.count("t") for part in chosen if "t" in part)
    few = [part.replace("t", "") for part in chosen]
    layers = ["t" * min(part.count("t"), 1 + (part.count("t") > fewest)) for part in chosen]
    return "|".join(
        f"{'E' * ('E' in rest)}{own}{'L' * ('L' in rest)}"
        for rest, own in zip(few, layers, strict=True)
    )


def small_depths(
    depths: Sequence[int],
    placed: Mapping[int, int],
    real_stages: int,
    num_stages: int,
    at_least: int = 0,
) -> list[int]:
    """Return the layers of each model in ``num_stages``: equal if they were, else in their order.

    Args:
        depths: layers of each model.
        placed: layers of a typed pipeline layout and what is left of them; empty without one.
        real_stages: of the run, virtual ones too.
        num_stages: in small.
        at_least: layers of each, about.
    """
    found = []
    for depth in depths:
        per_stage = min(2, depth // real_stages) + sum(other < depth for other in set(depths))
        per_stage = max(per_stage, -(-at_least // num_stages))
        count = num_stages * per_stage + (depth % real_stages > 0)
        while count in placed.values():
            count += num_stages
        found.append(placed.get(depth, count))
    return found


def small_pairs(pairs: Sequence[Pair], depths: Sequence[int], small: Sequence[int]) -> str | None:
    """Return --kd-hidden-states for ``small`` layers of (student, teacher) in place of ``depths``.

    Last layers stay last ones; pairs that fall together become one.
    """

    def moved(layer: int | None, which: int) -> int | None:
        return None if layer is None else layer * small[which] // depths[which]

    renamed = [replace(p, teacher=moved(p.teacher, 1), student=moved(p.student, 0)) for p in pairs]
    return ",".join(dict.fromkeys(map(str, renamed))) or None


def small_target(source: Arch, target: Arch, small: Arch, num_layers: int) -> Arch:
    """Return what is to ``small`` as ``target`` is to ``source``, with ``num_layers``.

    Where something is cut, something is cut and something left.
    """
    sizes = {}
    for name in sizes_of(source):
        before, after, now = (getattr(arch, name) for arch in (source, target, small))
        if before != after:
            sizes[name] = min(max(1, now * after // before), now - (now > 1))
    groups = sizes.get("num_query_groups", small.num_query_groups)
    sizes["num_query_groups"] = groups
    sizes["num_attention_heads"] = target.num_attention_heads // target.num_query_groups * groups
    if "num_experts" in sizes:
        sizes["num_experts"] = max(sizes["num_experts"], small.moe_router_topk)
    return replace(small.with_layers(range(num_layers)), **{**sizes, "num_layers": num_layers})


def small_batch(
    batch: Any, real: Ranks, small: Ranks, *, interleaved: bool, samples: int
) -> tuple[Any, int]:
    """Return the batch flags in small, and the samples of one step on all ranks.

    One micro-batch of a rank or several, one sample of it or several, as before. ``samples`` are
    those of a step of the run.
    """
    micro = min(batch.micro_batch_size, 2)
    count = min(samples // (batch.micro_batch_size * real.dp), 2 * small.pp)
    count = up_to_multiple(count, small.pp if interleaved else 1)
    batch = replace(batch, micro_batch_size=micro, seq_length=seq_length(small))
    return batch, micro * count * small.dp


def small_parallel(parallel: Any, small: Ranks, layout: str | None, virtual: int) -> Any:
    """Return the layout flags in small: gloo ranks of a CPU with local layers.

    Args:
        parallel: of the run.
        small: sizes.
        layout: of the pipeline, in small.
        virtual: model pieces of each pipeline rank.
    """
    is_cut, interleaves = small.pp > 1, small.pp > 1 and virtual > 1
    flush = parallel.overlap_p2p_communication_warmup_flush
    changes = {
        "tensor_model_parallel_size": small.tp,
        "pipeline_model_parallel_size": small.pp,
        "context_parallel_size": small.cp,
        "expert_model_parallel_size": small.ep,
        "sequence_parallel": parallel.sequence_parallel and small.tp > 1,
        "num_layers_per_virtual_pipeline_stage": None,
        "num_virtual_stages_per_pipeline_rank": virtual if interleaves and not layout else None,
        "pipeline_model_parallel_layout": layout if is_cut else None,
        **dict.fromkeys(ENDS),  # they stand in ``layout``
        "expert_tensor_parallel_size": None,
        "moe_router_dtype": None,  # all is float64 here
        "overlap_p2p_communication_warmup_flush": flush and interleaves,
        "device": "cpu",
        "distributed_backend": "gloo",
        "transformer_impl": "local",
    }
    kept = replace(parallel, **changes)
    return replace(kept, **{name: getattr(type(kept), name) for name in not_on_cpu(kept)})


def not_on_cpu(parallel: Any) -> list[str]:
    """Return the layout flags without effect on gloo ranks of a CPU, or that these do not know."""
    names = ["attention_backend", "cp_comm_type", "moe_grouped_gemm"]
    if parallel.tensor_model_parallel_size > 1:  # gloo gathers equal parts only
        names.append("moe_token_dispatcher_type")
    own = {f.name for f in fields(parallel)}
    return [name for name in names if name in own]


def serial(parallel: Any) -> Any:
    """Return the layout flags of one rank."""
    return type(parallel)(device="cpu", distributed_backend="gloo", transformer_impl="local")
