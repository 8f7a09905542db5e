"""Rearrangements of Hugging Face's tensors into Megatron's, and back. Pure.

``merge`` takes Hugging Face's tensors of one weight and returns Megatron's, ``split`` is its
inverse, bit for bit. Either may return views. Weights [out, in] and biases [out] alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ext.arch import Arch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A rearrangement in both directions."""

    merge: "Callable[[Sequence[Tensor], Arch], Tensor]"
    split: "Callable[[Tensor, Arch], Sequence[Tensor]]"


def _cat(parts: "Sequence[Tensor]", dim: int = 0) -> "Tensor":
    import torch  # not above: --help and dry runs read the table of families

    return torch.cat(list(parts), dim)


def merge_qkv(parts: "Sequence[Tensor]", arch: Arch) -> "Tensor":
    """Return the queries, key and value of query group 0, then of group 1, ...

    ``parts``: queries [heads * kv_channels, ...], keys and values [groups * kv_channels, ...].
    """
    grouped = [part.reshape(arch.num_query_groups, -1, *part.shape[1:]) for part in parts]
    return _cat(grouped, 1).flatten(0, 1)


def split_qkv(tensor: "Tensor", arch: Arch) -> "list[Tensor]":
    """Return the inverse of ``merge_qkv``."""
    groups, width = arch.num_query_groups, arch.kv_channels
    queries = arch.num_attention_heads // groups * width
    grouped = tensor.reshape(groups, -1, *tensor.shape[1:])
    return [part.flatten(0, 1) for part in grouped.split([queries, width, width], dim=1)]


def chunk_qkv(tensor: "Tensor", arch: Arch) -> "Sequence[Tensor]":
    """Return queries, keys and values of a tensor that holds all queries, all keys, all values."""
    heads, groups = arch.num_attention_heads, arch.num_query_groups
    return tensor.split([n * arch.kv_channels for n in (heads, groups, groups)])


COPY = Layout(lambda parts, arch: parts[0], lambda tensor, arch: [tensor])
QKV = Layout(merge_qkv, split_qkv)
# Two halves, the gate first.
GATED = Layout(lambda parts, arch: _cat(parts), lambda tensor, arch: tensor.chunk(2))
# Queries, keys and values as one tensor, one after the other.
FUSED_QKV = Layout(
    lambda parts, arch: merge_qkv(chunk_qkv(parts[0], arch), arch),
    lambda tensor, arch: [_cat(split_qkv(tensor, arch))],
)
# GPT-2 holds its matrices as [in, out]; a bias is its own transpose.
TRANSPOSED = Layout(lambda parts, arch: parts[0].t(), lambda tensor, arch: [tensor.t()])
TRANSPOSED_QKV = Layout(
    lambda parts, arch: FUSED_QKV.merge([parts[0].t()], arch),
    lambda tensor, arch: [FUSED_QKV.split(tensor, arch)[0].t()],
)
