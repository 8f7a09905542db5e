"""Trimming: a plan applied to the tensors of a checkpoint, piece by piece.

A piece is one weight outside the layers, or one weight of one kept layer. A distributed checkpoint
holds global tensors, so that global indices are all there is to cut with, however the model was
spread over ranks when it was saved.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor
from torch import Tensor

from megatron_ext.arch import LAYER_PREFIX, Arch, Weight, shape, weights
from megatron_ext.checkpoint import NOT_WEIGHTS, sharded_tensors
from megatron_ext.errors import CHECKPOINT, UserError
from megatron_ext.pruning.kept import kept_indices
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.residual import fold_heads
from megatron_ext.slices import SliceReader, layer_key

# numpy gathers columns 4x faster than torch on CPUs and has no bfloat16: it moves integers.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Piece:
    """One unit of work of trimming."""

    weight: Weight
    layer: int | None
    """The layer's number in the source; None outside the layers."""
    new_layer: int | None
    """The layer's number in the target."""


def trim_tensor(tensor: Tensor, dims: tuple[str, ...], plan: Plan, layer: int | None) -> Tensor:
    """Return what ``plan`` keeps of a CPU tensor whose axes have the named ``dims``.

    ``tensor`` itself comes back if all of it stays. ``layer`` counts in the source.
    """
    assert tensor.ndim == len(dims), f"{list(tensor.shape)} has not the dims {dims}"
    # The first axis first: rows are cheap to drop and leave fewer columns to gather.
    for axis, dim in enumerate(dims):
        kept = kept_indices(plan, dim, layer)
        if kept is not None:
            numbers = tensor.view(INTEGERS[tensor.element_size()]).numpy()
            gathered = torch.from_numpy(numpy.take(numbers, kept.numpy(), axis=axis))
            tensor = gathered.view(tensor.dtype)
    return tensor


def trimmed_share(
    reader: SliceReader, plan: Plan, rank: int, world_size: int
) -> dict[str, ShardedTensor | ShardedObject]:
    """Read and trim this rank's share of the weights. No collectives.

    All ranks' shares together are the target's checkpoint, layers stacked; every element is held by
    one rank, and each rank has about the same number of bytes. Beside its share, a rank holds one
    piece of the source at a time.

    Raises:
        UserError: on every rank, if the checkpoint's tensors are not those of ``plan.source``; on
            this rank alone, if a file is damaged: gather errors before the next collective.
    """
    check_tensors(reader, plan.source)
    share = empty_extra_states(reader, plan.target) if rank == 0 else {}
    spare = None
    for piece in deal(pieces(plan), plan.target, world_size)[rank]:
        key, dims = piece.weight.key, piece.weight.dims
        # Pieces of one shape follow each other: fresh memory costs more than reading into old.
        if piece.layer is None:
            name, place, axes = key, [], 0
        else:
            name = layer_key(key, piece.new_layer)
            place, axes = [(0, piece.new_layer, plan.target.num_layers)], 1
        source = _read(reader, piece.weight, piece.layer, spare)
        trimmed = _cut(source, dims, plan, piece.layer)
        spare = None if trimmed is source else source
        share[name] = ShardedTensor.from_rank_offsets(key, trimmed, *place, prepend_axis_num=axes)
    return share


@torch.no_grad()
def fill_trimmed(state: ShardedStateDict, reader: SliceReader, plan: Plan) -> None:
    """Fill this rank's part of a model of ``plan.target`` with trimmed weights. No collectives.

    A rank reads whole tensors of the source, one at a time, and keeps its shards.

    Args:
        state: the model's sharded tensors, which share memory with its parameters.
        reader: of the source's checkpoint.
        plan: what to cut.

    Raises:
        UserError: as ``trimmed_share``.
    """
    check_tensors(reader, plan.source)
    rows = {weight.key: weight for weight in weights(plan.target)}
    last, whole = None, torch.empty(0)
    for shard in sharded_tensors(state):
        weight, axes = rows[shard.key], shard.prepend_axis_num
        layer = plan.layers[shard.global_offset[0]] if weight.per_layer else None
        if last != (weight, layer):  # a gated MLP's two halves are one tensor
            whole = _cut(_read(reader, weight, layer), weight.dims, plan, layer)
            last = weight, layer
        starts = zip(shard.global_offset[axes:], shard.local_shape, strict=True)
        place = (*shard.global_offset[1:axes], *(slice(start, start + n) for start, n in starts))
        shard.data.copy_(whole[place])


def _read(
    reader: SliceReader, weight: Weight, layer: int | None, spare: Tensor | None = None
) -> Tensor:
    if layer is None:
        return reader.read(weight.key, [slice(None)] * len(weight.dims), spare)
    return reader.read_layer(weight.key, layer, spare)


def _cut(tensor: Tensor, dims: tuple[str, ...], plan: Plan, layer: int | None) -> Tensor:
    """Return ``tensor`` as it stands in the target: heads folded, units cut."""
    if dims[0] == "qkv" and plan.residual_pairs:
        pairs = plan.residual_pairs[layer]
        tensor = fold_heads(tensor, plan.head_residual, pairs, plan.source)
    return trim_tensor(tensor, dims, plan, layer)


def empty_extra_states(reader: SliceReader, target: Arch) -> dict[str, ShardedObject]:
    """Return the ``_extra_state`` objects of the target: those of the source, without content.

    A model does not load without them. What they may hold, Transformer Engine's FP8 scales, comes
    from activations that trimming has changed.
    """
    states = {}
    for name in sorted(reader.objects):
        key = re.sub(rf"^{re.escape(LAYER_PREFIX)}\d+\.", LAYER_PREFIX, name.split("/")[0])
        if key.endswith("_extra_state"):
            count = target.num_layers if key.startswith(LAYER_PREFIX) else 1
            for place in range(count):
                states[f"{key}.{place}"] = ShardedObject(key, None, (count,), (place,))
    return states


def pieces(plan: Plan) -> Iterator[Piece]:
    """Yield every piece of the target, in the order of the table of weights."""
    for weight in weights(plan.target):
        if not weight.per_layer:
            yield Piece(weight, None, None)
            continue
        for new_layer, layer in enumerate(plan.layers):
            yield Piece(weight, layer, new_layer)


def deal(work: Iterator[Piece], target: Arch, world_size: int) -> list[list[Piece]]:
    """Give every piece to one rank: the largest first, each to the rank with the least so far.

    The same on every rank. Sizes are those of the trimmed tensors, in elements.
    """
    hands: list[list[Piece]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    sized = [(torch.Size(shape(piece.weight, target)).numel(), piece) for piece in work]
    for size, piece in sorted(sized, key=lambda entry: -entry[0]):
        rank = loads.index(min(loads))
        hands[rank].append(piece)
        loads[rank] += size
    return hands


def check_tensors(reader: SliceReader, arch: Arch) -> None:
    """Compare the tensors of a checkpoint with the table of ``arch``, by name and shape.

    Raises:
        UserError: naming the first tensor that is missing, has another shape or has no row.
    """
    expected = {}
    for weight in weights(arch):
        size = shape(weight, arch)
        if not weight.per_layer:
            expected[weight.key] = size
        elif weight.key in reader.shapes:
            expected[weight.key] = (arch.num_layers, *size)
        else:
            expected |= {layer_key(weight.key, i): size for i in range(arch.num_layers)}
    for key, size in expected.items():
        if key not in reader.shapes:
            raise UserError(
                f"{reader.folder} has no tensor {key}, which its saved args call for.", CHECKPOINT
            )
        found = reader.shapes[key][0]
        if found != size:
            raise UserError(
                f"{reader.folder}: {key} is {list(found)}, the saved args say {list(size)}.",
                CHECKPOINT,
            )
    for key in reader.shapes:
        if key not in expected and not key.startswith(NOT_WEIGHTS) and "_extra_state" not in key:
            raise UserError(
                f"{reader.folder}: the tensor {key} has no row in the table of weights (arch.py): "
                "it is not known how to trim it.",
                CHECKPOINT,
            )
