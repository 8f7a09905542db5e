"""The weights of a model piece by piece, each with its tensors in a Hugging Face folder."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_ext.arch import Arch, Weight, dim_sizes, is_of_experts, weights
from megatron_ext.convert.family import Family
from megatron_ext.convert.rows import Row, row_name
from megatron_ext.pruning import trim


@dataclass(frozen=True, kw_only=True)
class Piece(trim.Piece):
    """One weight outside the layers, or of one layer, or of one expert of it."""

    row: Row
    number: int | None
    """The layer's number; of a HybridModel the sub-layer's among all."""
    last: int
    """The last layer's number."""
    behind: tuple[Weight, ...] = ()
    """Megatron's other tensors, where Hugging Face's holds ``weight`` and them."""

    @property
    def parts(self) -> "list[Piece]":
        """The piece as pieces of one Megatron tensor each."""
        return [replace(self, weight=weight, behind=()) for weight in (self.weight, *self.behind)]

    @property
    def names(self) -> Sequence[str]:
        """Its tensors in a Hugging Face folder."""
        names = self.row.first if self.number == 0 and self.row.first else self.row.names
        numbers = {"before": (self.number or 0) - 1, "layer": self.number, "last": self.last}
        return [name.format(expert=self.expert, **numbers) for name in names]

    @property
    def has_vocab(self) -> bool:
        """Whether its rows are those of the vocabulary, which are padded."""
        return self.weight.dims[0] == "vocab"

    def merge(self, parts: Sequence[Tensor], arch: Arch) -> Tensor:
        """Return the Megatron tensor, several behind each other; padding rows are zero."""
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
        """Return the shape of the Megatron tensor, or of several behind each other."""
        sizes = dim_sizes(arch)
        rows = sum(sizes[part.dims[0]] for part in self.parts)
        return rows, *(sizes[dim] for dim in self.dims[1:])

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
    rows: dict[str, list[Weight]] = {}
    for weight in weights(arch):
        rows.setdefault(row_name(weight.key, family.rows), []).append(weight)

    def piece(name: str, number: int | None, *numbers: int | None) -> Piece:
        weight, *behind = rows[name]
        last, row = arch.num_layers - 1, family.rows[name]
        return Piece(weight, *numbers, row=row, number=number, last=last, behind=tuple(behind))

    outside = [piece(name, None, None, None) for name, (w, *_) in rows.items() if not w.per_layer]
    first = [piece for piece in outside if piece.weight.key.startswith("embedding.")]
    yield from first
    for number in range(arch.num_layers):
        for name, (weight, *_) in rows.items():
            layers = arch.layers_of(weight.kind) if weight.per_layer else ()
            if number not in layers:
                continue
            layer = layers.index(number)
            for expert in range(arch.num_experts) if is_of_experts(weight) else [None]:
                yield piece(name, number, layer, layer, expert, expert)
    yield from outside[len(first) :]
