"""Fold pruned heads into kept ones, as ``residual`` pairs them."""

import torch
from torch import Tensor

from megatron_ext.arch import Arch
from megatron_ext.pruning.residual import LACO, PAPER, Pairs


def fold_heads(qkv: Tensor, mode: str, pairs: Pairs, arch: Arch) -> Tensor:
    """Return the rows of linear_qkv with pruned heads folded into kept ones; ``qkv`` stays.

    Computed in float32 at least and rounded once.

    Args:
        qkv: a weight [qkv, hidden] or bias [qkv] of ``arch``, before trimming.
        mode: ``paper`` or ``laco``.
        pairs: of this layer.
        arch: the source.
    """
    assert mode in (PAPER, LACO), mode
    per_group = arch.num_attention_heads // arch.num_query_groups
    # Per query group: its queries, key, value.
    blocks = qkv.view(arch.num_query_groups, per_group + 2, arch.kv_channels, *qkv.shape[1:])
    folded = blocks.clone()
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    for pair in pairs:
        # A group of one head goes as a whole.
        kept, pruned = (divmod(head, per_group) if per_group > 1 else head for head in pair)
        x, y = blocks[kept].to(dtype), blocks[pruned].to(dtype)
        folded[kept] = (2 * x - y if mode == PAPER else y).to(qkv.dtype)
    return folded.view(qkv.shape)
