"""What a plan keeps of a tensor's axis: the only place that knows how units spread over tensors."""

import torch
from torch import Tensor

from megatron_ext.arch import Arch
from megatron_ext.pruning.plan import Plan


def kept_indices(
    plan: Plan, dim: str, layer: int | None, expert: int | None = None
) -> Tensor | None:
    """Return the [n] int64 positions that stay of a tensor axis, or None if all do.

    Args:
        plan: what is kept.
        dim: a named dim of ``megatron_ext.arch``.
        layer: the layer's number in the source; None for a weight outside the layers.
        expert: the expert's number in the source, of a weight of one expert.
    """
    source = plan.source
    if dim == "hidden":
        return _unless_all(torch.tensor(plan.hidden), source.hidden_size)
    if dim == "experts":
        return _unless_all(torch.tensor(plan.experts[layer]), source.num_experts)
    if dim in ("ffn", "fc1"):
        return _neurons(plan.ffn[layer], source.ffn_hidden_size, dim, source)
    if dim in ("moe_ffn", "moe_fc1"):
        return _neurons(plan.moe_ffn[layer, expert], source.moe_ffn_hidden_size, dim, source)
    if dim in ("shared_ffn", "shared_fc1"):
        length = source.moe_shared_expert_intermediate_size
        return _neurons(plan.shared_ffn[layer], length, dim, source)
    if dim in ("heads", "qkv"):
        # Heads as blocks of kv_channels: in "heads" one per query head, in "qkv" one per query
        # head of a group, then its key, then its value.
        if dim == "heads":
            blocks, num_blocks = list(plan.heads[layer]), source.num_attention_heads
        else:
            blocks = _qkv_blocks(plan.heads[layer], source)
            num_blocks = source.num_attention_heads + 2 * source.num_query_groups
        channels = torch.arange(source.kv_channels)
        rows = torch.tensor(blocks).unsqueeze(1) * source.kv_channels + channels
        return _unless_all(rows.flatten(), num_blocks * source.kv_channels)
    assert dim in ("head_dim", "vocab", "position", "tokentype"), f"no rule to trim the dim {dim!r}"
    return None


def _neurons(kept: tuple[int, ...], length: int, dim: str, source: Arch) -> Tensor | None:
    neurons = torch.tensor(kept)
    if dim.endswith("fc1") and source.swiglu:  # [gate ; up]
        return _unless_all(torch.cat([neurons, neurons + length]), 2 * length)
    return _unless_all(neurons, length)


def _qkv_blocks(heads: tuple[int, ...], source: Arch) -> list[int]:
    """Return blocks of kv_channels rows: each group's kept query heads, its key and its value."""
    per_group = source.num_attention_heads // source.num_query_groups
    blocks = []
    for group in dict.fromkeys(head // per_group for head in heads):
        first = group * (per_group + 2)
        blocks += [first + head % per_group for head in heads if head // per_group == group]
        blocks += [first + per_group, first + per_group + 1]
    return blocks


def _unless_all(indices: Tensor, length: int) -> Tensor | None:
    return None if torch.equal(indices, torch.arange(length)) else indices
