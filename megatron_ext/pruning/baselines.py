"""Scores without data or forward passes, to compare activations with: weight magnitude and chance.

Both have the form of ``pruning.scores`` and take the same way to a plan.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_ext.arch import Arch
from megatron_ext.arch.rows import Axis
from megatron_ext.checkpoint.slices import SliceReader
from megatron_ext.pruning.kept import units_on
from megatron_ext.pruning.planner import make_plan
from megatron_ext.pruning.scores import lengths
from megatron_ext.pruning.trim import Piece, check_tensors, deal, pieces, read_piece
from megatron_ext.runtime.collective_errors import on_all_ranks
from megatron_ext.runtime.errors import UserError

# Ends of the names of gammas that --apply-layernorm-1p stores as gamma - 1.
GAMMAS = ("layernorm.weight", "layer_norm.weight", "layer_norm_weight", "final_norm.weight")


def random_scores(arch: Arch, seed: int, *, sublayers: bool = False) -> dict[str, Tensor]:
    """Return scores drawn from [0, 1), each vector from a generator of (seed, its name)."""
    vectors = {}
    for name, length in lengths(arch, sublayers=sublayers).items():
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        vectors[name] = torch.rand(length, generator=generator)
    return vectors


def magnitude_scores(
    reader: SliceReader, arch: Arch, device: torch.device, *, sublayers: bool = False
) -> dict[str, Tensor]:
    """Return the L2 norm of the weights that go when a unit goes. Collective over all ranks.

    The score of a layer or sub-layer is the norm of all its weights. A key
    and value that several heads share belong to none of them. Padding rows of the vocabulary do not
    count, and a norm's gamma counts as it multiplies, also where gamma - 1 is stored.

    Each rank reads its share of (weight, layer) pieces, one at a time; one all-reduce of a float64
    number per unit, one gather of errors.

    Args:
        reader: of the checkpoint, this rank's.
        arch: its sizes.
        device: where this rank's collectives run.
        sublayers: score those of a GPTModel too.

    Returns:
        Float32 vectors on the CPU, the same on every rank.

    Raises:
        UserError: on every rank; the checkpoint is damaged or not one of ``arch``, or weights are
            NaN or infinite.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    names = lengths(arch, sublayers=sublayers)
    sums = on_all_ranks(lambda: _share(reader, arch, names, rank, world_size))
    flat = torch.cat(list(sums.values())).to(device)
    torch.distributed.all_reduce(flat)
    vectors = dict(zip(sums, flat.cpu().split([len(x) for x in sums.values()]), strict=True))
    for name, vector in vectors.items():
        if not vector.isfinite().all():
            raise UserError(
                f"weights that score {name!r} are NaN or infinite: check the weights under --load."
            )
    return {name: vector.sqrt().float() for name, vector in vectors.items()}


def _share(
    reader: SliceReader, arch: Arch, names: Mapping[str, int], rank: int, world_size: int
) -> dict[str, Tensor]:
    """Return this rank's sums of squares, float64, under the names of the scores."""
    check_tensors(reader, arch)
    sums = {name: torch.zeros(n, dtype=torch.float64) for name, n in names.items()}
    everything = make_plan(None, arch, arch)
    for piece in deal(pieces(everything), arch, world_size)[rank]:
        _add_squares(sums, piece, _read(reader, piece, arch), arch)
    return sums


def _read(reader: SliceReader, piece: Piece, arch: Arch) -> Tensor:
    weight = read_piece(reader, piece, arch)
    if piece.dims[0] == "vocab":
        weight = weight[: arch.vocab_size]
    is_gamma = piece.weight.key.endswith(GAMMAS)
    return weight.float() + 1 if is_gamma and arch.apply_layernorm_1p else weight.float()


def _add_squares(sums: Mapping[str, Tensor], piece: Piece, weight: Tensor, arch: Arch) -> None:
    squares = weight.square()
    if piece.layer is not None:
        for depth in sums.keys() & {"layers", piece.weight.kind}:
            sums[depth][piece.layer] += squares.sum(dtype=torch.float64)
    if piece.expert is not None:
        sums[f"experts.{piece.layer}"][piece.expert] += squares.sum(dtype=torch.float64)
    for number, dim in enumerate(piece.dims):
        if dim in piece.dims[:number]:
            squares.fill_diagonal_(0)  # in a unit's row already
        others = [other for other in range(squares.ndim) if other != number]
        for axis, _, units in units_on(dim, arch, piece.layer):
            per_position = (squares.sum(dim=others) if others else squares).double()
            vector = sums[axis.vector(piece.layer, piece.expert)]
            has_unit = units < axis.length(arch, piece.layer)  # what a group shares is no unit's
            index, values = units[has_unit], per_position[has_unit]
            if axis.across is not None:
                place = dim, arch, piece.layer
                index, values = _across(axis.across, index, values, has_unit, *place)
            vector.index_add_(0, index, values)


def _across(
    other: Axis,
    units: Tensor,
    values: Tensor,
    has_unit: Tensor,
    dim: str,
    arch: Arch,
    layer: int | None,
) -> tuple[Tensor, Tensor]:
    """Return the squares of units by the places of their scores: of each unit and one of ``other``.

    Where those of ``other`` do not lie on the dim, each gets the same share.
    """
    width = other.length(arch, layer)
    for axis, _, others in units_on(dim, arch, layer):
        if axis is other:
            return units * width + others[has_unit], values
    places = units.unsqueeze(1) * width + torch.arange(width)
    return places.flatten(), (values / width).repeat_interleave(width)
