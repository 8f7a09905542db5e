"""The weights of a model piece by piece, each with its tensors in a Hugging Face folder."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.arch import Arch, Weight, dim_sizes, is_of_experts, weights
from megatron_ext.convert.family import Family
from megatron_ext.convert.rows import Row
from megatron_ext.pruning import trim


@dataclass(frozen=True, kw_only=True)
class Piece(trim.Piece):
    """One weight outside the layers, or of one layer, or of one expert of it."""

    row: Row
    last: int
    """The last layer's number."""

    @property
    def names(self) -> Sequence[str]:
        """Its tensors in a Hugging Face folder."""
        names = self.row.first if self.layer == 0 and self.row.first else self.row.names
        numbers = {"before": (self.layer or 0) - 1, "layer": self.layer, "last": self.last}
        return [name.format(expert=self.expert, **numbers) for name in names]

    @property
    def has_vocab(self) -> bool:
        """Whether its rows are those of the vocabulary, which are padded."""
        return self.weight.dims[0] == "vocab"

    def merge(self, parts: Sequence[Tensor], arch: Arch) -> Tensor:
        """Return the Megatron tensor; rows that pad the vocabulary are zero."""
        whole = self.row.layout.merge(parts, arch)
        missing = arch.padded_vocab_size - len(whole) if self.has_vocab else 0
        if missing:
            whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
        return whole.contiguous()

    def split(self, tensor: Tensor, arch: Arch, num_rows: int) -> list[Tensor]:
        """Return the inverse of ``merge``; a vocabulary has ``num_rows`` in the folder."""
        parts = self.row.layout.split(tensor, arch)
        return [part[:num_rows] if self.has_vocab else part for part in parts]

    def shape(self, arch: Arch) -> tuple[int, ...]:
        """Return the shape of the Megatron tensor."""
        sizes = dim_sizes(arch)
        return tuple(sizes[dim] for dim in self.dims)

    def numel(self, arch: Arch) -> int:
        """Return the elements of the Megatron tensor."""
        return math.prod(self.shape(arch))

    def shapes(self, arch: Arch, num_rows: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of its tensors in a Hugging Face folder, by name."""
        empty = torch.empty(self.shape(arch), device="meta")
        parts = self.split(empty, arch, num_rows)
        return {name: tuple(x.shape) for name, x in zip(self.names, parts, strict=True)}


def pieces(arch: Arch, family: Family) -> Iterator[Piece]:
    """Yield every piece of ``arch``: before the layers, layer by layer, behind the layers.

    ``family`` has such models, as ``config_of`` says.
    """
    rows = weights(arch)

    def piece(weight: Weight, *numbers: int | None) -> Piece:
        return Piece(weight, *numbers, row=family.rows[weight.key], last=arch.num_layers - 1)

    outside = [piece(w, None, None) for w in rows if not w.per_layer]
    first = [piece for piece in outside if piece.weight.key.startswith("embedding.")]
    yield from first
    for layer in range(arch.num_layers):
        for weight in rows:
            if not weight.per_layer:
                continue
            for expert in range(arch.num_experts) if is_of_experts(weight) else [None]:
                yield piece(weight, layer, layer, expert, expert)
    yield from outside[len(first) :]
