"""Results of all ranks of a layout, put together and compared with those of one rank."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan
from typing import Any

import torch
from torch import Tensor

from megatron_ext.arch import LAYER_PREFIXES, Arch, weights

Pieces = Mapping[tuple[str, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Difference:
    """Distance of one result of a layout from that of one rank."""

    name: str
    error: float
    """Largest absolute difference, over the largest value of the result on one rank."""


def whole(pieces: Pieces) -> dict[str, Tensor]:
    """Put a serial run's pieces together: one tensor per name."""
    found = {}
    for key in {key for key, _ in pieces}:
        own = [(offset, tensor) for (k, offset), tensor in pieces.items() if k == key]
        last, tensor = max(own, key=lambda piece: piece[0])
        ones = (1,) * (len(last) - tensor.ndim)
        size = [o + n for o, n in zip(last, (*ones, *tensor.shape), strict=True)]
        found[key] = tensor.new_zeros(size)
        for offset, tensor in own:
            found[key][region(offset, tensor)] = tensor
    return found


def region(offset: Sequence[int], tensor: Tensor) -> tuple[int | slice, ...]:
    """Return the index of a piece in the whole tensor; layers and experts come first, one each."""
    axes = len(offset) - tensor.ndim
    starts = zip(offset[axes:], tensor.shape, strict=True)
    return (*offset[:axes], *(slice(start, start + n) for start, n in starts))


def relative(value: Tensor, reference: Tensor, least: float = 0.0) -> float:
    """Return max |value - reference| / max |reference|, the divisor at least ``least``."""
    size = max(reference.abs().max().item(), least)
    gap = (value - reference).abs().max().item()
    if isnan(gap):
        return inf
    return gap / size if gap else 0.0


def of_figures(found: Sequence[Mapping], reference: Mapping[str, float]) -> list[Difference]:
    """Compare losses and gradient norm; of the ranks the worst counts."""
    return [
        Difference(name, max(relative(_float64(each[name]), _float64(value)) for each in found))
        for name, value in reference.items()
    ]


def _float64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def of_states(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> list[Difference]:
    """Compare what embedding and layers put out, in the order of the forward pass."""
    return [
        Difference(
            f"{who}: output of " + (f"layer {row - 1}" if row else "the embedding"),
            relative(found[who][row], means[row]),
        )
        for who, means in reference.items()
        for row in range(len(means))
    ]


def of_gradients(found: Sequence[Pieces], serial: Pieces, arch: Arch) -> list[Difference]:
    """Compare every weight of every layer, in the order of the backward pass.

    A weight of which a part is on no rank is infinitely far off.
    """
    reference = whole(serial)
    least = 1e-9 * max(tensor.abs().max().item() for tensor in reference.values())
    seen = {key: torch.zeros(tensor.shape, dtype=torch.bool) for key, tensor in reference.items()}
    errors: dict[tuple[str, int | None], float] = {}
    for (key, offset), piece in (item for pieces in found for item in pieces.items()):
        layer = offset[0] if key.startswith(LAYER_PREFIXES) else None
        scale = reference[key] if layer is None else reference[key][layer]
        place = region(offset, piece)
        size = max(scale.abs().max().item(), least)
        error = relative(piece, reference[key][place], size)
        errors[key, layer] = max(error, errors.get((key, layer), 0.0))
        seen[key][place] = True
    errors |= {(key, None): inf for key, mask in seen.items() if not mask.all()}
    return [
        Difference(weight_name(key, layer), errors[key, layer])
        for key, layer in sorted(errors, key=_forward_order(arch), reverse=True)
    ]


def weight_name(key: str, layer: int | None) -> str:
    """Return a weight's name as megatron-core's models have it: ``decoder.layers.3.mlp...``."""
    if layer is None:
        return key
    prefix = next(prefix for prefix in LAYER_PREFIXES if key.startswith(prefix))
    return f"{prefix}{layer}.{key.removeprefix(prefix)}"


def _forward_order(arch: Arch) -> Any:
    rows = [weight.key for weight in weights(arch)]
    in_layers = [index for index, key in enumerate(rows) if key.startswith(LAYER_PREFIXES)]

    def order(piece: tuple[str, int | None]) -> tuple[int, int, int]:
        key, layer = piece
        row = rows.index(key) if key in rows else len(rows)  # a map of hidden states
        if layer is not None:
            return 1, layer, row
        return (0 if row < in_layers[0] else 2), 0, row

    return order


def of_scores(
    found: Sequence[Mapping[str, Tensor]], reference: Mapping[str, Tensor]
) -> list[Difference]:
    """Compare every vector of scores; of the ranks the worst counts."""
    return [
        Difference(name, max(relative(each[name], vector) for each in found))
        for name, vector in reference.items()
    ]


def worst(differences: Iterable[Difference]) -> Difference:
    """Return the largest."""
    return max(differences, key=lambda each: each.error)


def first(differences: Iterable[Difference], tolerance: float) -> Difference | None:
    """Return the first beyond ``tolerance``, or None."""
    return next((each for each in differences if each.error > tolerance), None)
