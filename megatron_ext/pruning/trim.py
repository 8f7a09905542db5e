"""Trimming: a plan applied to the tensors of a checkpoint, piece by piece.

A piece is one weight outside the layers, or one weight of one kept layer, or of one kept expert of
it. A distributed checkpoint holds global tensors, so that global indices are all there is to cut
with, however the model was spread over ranks when it was saved.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor
from torch import Tensor

from megatron_ext.arch import (
    LAYER_PREFIXES,
    Arch,
    Weight,
    count,
    is_of_experts,
    kind_of,
    layer_key,
    names_on_disk,
    shape,
    weights,
)
from megatron_ext.arch.rows import kept_layers
from megatron_ext.checkpoint import checkpoints, saved_args, writer
from megatron_ext.checkpoint.checkpoints import NOT_WEIGHTS, sharded_tensors
from megatron_ext.checkpoint.finite import check_finite
from megatron_ext.checkpoint.folder import Checkpoint
from megatron_ext.checkpoint.slices import SliceReader
from megatron_ext.cli.size_flags import megatron_args
from megatron_ext.pruning.fold import fold_heads
from megatron_ext.pruning.kept import kept_indices
from megatron_ext.pruning.plan import Plan
from megatron_ext.runtime.collective_errors import on_all_ranks
from megatron_ext.runtime.errors import CHECKPOINT, UserError

# numpy gathers columns 4x faster than torch on CPUs and has no bfloat16: it moves integers.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Piece:
    """One unit of work of trimming."""

    weight: Weight
    layer: int | None
    """The number in the source of the layer, or of the sub-layer within its kind, which is the same
    where all layers are whole; None outside the layers."""
    new_layer: int | None
    """The number in the target."""
    expert: int | None = None
    """The expert's number in the source; None for a weight of no expert."""
    new_expert: int | None = None

    @property
    def dims(self) -> tuple[str, ...]:
        """The dims of the piece, one per axis."""
        return self.weight.dims if self.expert is None else self.weight.dims[1:]


def trim_tensor(
    tensor: Tensor,
    dims: tuple[str, ...],
    plan: Plan,
    layer: int | None,
    expert: int | None = None,
) -> Tensor:
    """Return what ``plan`` keeps of a CPU tensor whose axes have the named ``dims``.

    ``tensor`` itself comes back if all of it stays. ``layer`` and ``expert`` count in the source.
    """
    assert tensor.ndim == len(dims), f"{list(tensor.shape)} has not the dims {dims}"
    # The first axis first: rows are cheap to drop and leave fewer columns to gather.
    for axis, dim in enumerate(dims):
        kept = kept_indices(plan, dim, layer, expert)
        if kept is not None:
            numbers = tensor.view(INTEGERS[tensor.element_size()]).numpy()
            gathered = torch.from_numpy(numpy.take(numbers, kept.numpy(), axis=axis))
            tensor = gathered.view(tensor.dtype)
    return tensor


def trimmed_share(
    reader: SliceReader, plan: Plan, rank: int, world_size: int
) -> dict[str, ShardedTensor | ShardedObject]:
    """Read and trim this rank's share of the weights. No collectives.

    All ranks' shares together are the target's checkpoint; every element is held by one rank, and
    each rank has about the same number of elements. Beside its share, a rank holds one piece of the
    source at a time, two where the shape changes from one to the next.

    Raises:
        UserError: on every rank, if the checkpoint's tensors are not those of ``plan.source``; on
            this rank alone, if a file is damaged: gather errors before the next collective.
    """
    check_tensors(reader, plan.source)
    share = empty_extra_states(reader, plan.target) if rank == 0 else {}
    spare = None
    for piece in deal(pieces(plan), plan.target, world_size)[rank]:
        # ``deal`` sorts pieces by size, so that those of one shape follow each other: a piece is
        # read into the memory of the one before, which costs less than fresh memory.
        source = read_piece(reader, piece, plan.source, spare)
        trimmed = _cut(source, piece, plan)
        spare = None if trimmed is source else source
        share |= as_share(piece, trimmed, plan.target)
    return share


def write_trimmed(source: Checkpoint, plan: Plan, save: str, record: Plan | None) -> None:
    """Cut the weights of ``source`` and publish them as ``save``/release. Collective.

    Args:
        source: the checkpoint of ``plan.source``.
        plan: what stays of it.
        save: folder above the new checkpoint.
        record: the plan to write beside the weights.

    Raises:
        UserError: on every rank; as ``trimmed_share``, or nothing can be written.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = on_all_ranks(lambda: trimmed_share(SliceReader(source.folder), plan, rank, world_size))
    weights_only = {"consumed_train_samples": 0, "no_save_optim": True, "no_save_rng": True}
    args = saved_args.complete(plan.target, {**source.args, **weights_only})
    writer.save(
        save,
        checkpoints.RELEASE,
        {"model": share, "args": args, "checkpoint_version": 3.0, "iteration": 0},
        files={
            **({"plan.json": record.to_json()} if record else {}),
            **megatron_args(plan.target),
            **source.tokenizer_files(),
        },
    )


def as_share(piece: Piece, tensor: Tensor, target: Arch) -> dict[str, ShardedTensor]:
    """Return ``tensor`` as a piece of the checkpoint of ``target``.

    A GPTModel's layers and experts are stacked, a HybridModel's sub-layers have names of their own.
    """
    key, stack = on_disk(piece, target)
    offsets = [(axis, number, count) for axis, (number, count) in enumerate(stack)]
    shard = ShardedTensor.from_rank_offsets(key, tensor, *offsets, prepend_axis_num=len(offsets))
    return {f"{key} {stack}": shard}


def on_disk(piece: Piece, target: Arch) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return the name of the tensor that holds a piece of the target, and its place in the stack.

    The place has a (number, count) for each dim of the stack: (layer, layers), (expert, experts),
    both, or neither.
    """
    key, stack = piece.weight.key, [(piece.new_expert, target.num_experts)]
    if piece.new_layer is not None and target.is_hybrid:
        key = layer_key(key, target.layers_of(piece.weight.kind)[piece.new_layer])
    else:
        stack.insert(0, (piece.new_layer, target.num_layers))
    return key, tuple((number, count) for number, count in stack if number is not None)


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
    by_offset = {}
    for piece in pieces(plan):
        key, stack = on_disk(piece, plan.target)
        by_offset[key, *(number for number, _ in stack)] = piece
    last, whole = None, torch.empty(0)
    for shard in sharded_tensors(state):
        axes = shard.prepend_axis_num
        piece = by_offset[shard.key, *shard.global_offset[:axes]]
        if piece != last:  # a gated MLP's two halves are one tensor
            whole, last = _cut(read_piece(reader, piece, plan.source), piece, plan), piece
        starts = zip(shard.global_offset[axes:], shard.local_shape, strict=True)
        shard.data.copy_(whole[tuple(slice(start, start + n) for start, n in starts)])


def read_piece(
    reader: SliceReader, piece: Piece, source: Arch, spare: Tensor | None = None
) -> Tensor:
    """Return a piece of the source; ``spare`` may be overwritten, as in ``SliceReader.read``."""
    key = disk_key(piece.weight.key, source)
    if piece.layer is None:
        tensor = reader.read(key, [slice(None)] * len(piece.dims), spare)
    else:
        layer = source.layers_of(piece.weight.kind)[piece.layer]
        tensor = reader.read_layer(key, layer, spare, expert=piece.expert)
        key = f"{key} of layer {layer} (from 0)"
    check_finite(reader.folder, [(key, tensor)])
    return tensor


def disk_key(key: str, arch: Arch) -> str:
    """Return a name of either model's table as that of ``arch`` has it: final norms differ."""
    names = "final_layernorm.", "final_norm."
    return key.replace(*(names if arch.is_hybrid else names[::-1]))


def _cut(tensor: Tensor, piece: Piece, plan: Plan) -> Tensor:
    """Return ``tensor`` as it stands in the target: heads folded, units cut."""
    if piece.dims[0] == "qkv" and plan.residual_pairs:
        pairs = plan.residual_pairs[piece.layer]
        sizes = plan.source.at(piece.weight.kind, piece.layer)
        tensor = fold_heads(tensor, plan.head_residual, pairs, sizes)
    return trim_tensor(tensor, piece.dims, plan, piece.layer, piece.expert)


def empty_extra_states(reader: SliceReader, target: Arch) -> dict[str, ShardedObject]:
    """Return the ``_extra_state`` objects of the target: those of the source, without content.

    A model does not load without them. What they may hold, Transformer Engine's FP8 scales, comes
    from activations that trimming has changed.
    """
    return empty_states(reader.objects, target)


def empty_states(names: Iterable[str], target: Arch) -> dict[str, ShardedObject]:
    """Return an empty object of ``target`` for each of the names that is an ``_extra_state``.

    As its weights, a GPTModel's are stacked and a HybridModel's have names of their own. A
    HybridModel asks for that of the output layer too, which a GPTModel leaves out.
    """
    states, names = {}, set(names)
    if target.is_hybrid and any("_extra_state" in name for name in names):
        names.add("output_layer._extra_state")
    for name in sorted(names):
        key = re.sub(r"^(\w+\.layers\.)\d+\.", r"\1", name.split("/")[0])
        if not key.endswith("_extra_state"):
            continue
        key, counts = disk_key(key, target), (1,)
        keys = names_on_disk(Weight(key, (), kind=kind_of(key, target)), target)
        if keys == [key] and key.startswith(LAYER_PREFIXES):
            counts = (target.num_layers,)
        if ".mlp.experts." in key:
            counts += (target.num_experts,)
        for key, place in itertools.product(keys, itertools.product(*map(range, counts))):
            states[f"{key} {place}"] = ShardedObject(key, None, counts, place)
    return states


def pieces(plan: Plan) -> Iterator[Piece]:
    """Yield every piece of the target, in the order of the table of weights."""
    for weight in weights(plan.target):
        if not weight.per_layer:
            yield Piece(weight, None, None)
            continue
        for new_layer, layer in enumerate(kept_layers(plan.kept, weight.kind)):
            if not is_of_experts(weight):
                yield Piece(weight, layer, new_layer)
                continue
            for new_expert, expert in enumerate(plan.kept[f"experts.{layer}"]):
                yield Piece(weight, layer, new_layer, expert, new_expert)


def deal(work: Iterator[Piece], target: Arch, world_size: int) -> list[list[Piece]]:
    """Give every piece to one rank: the largest first, each to the rank with the least so far.

    The same on every rank. Sizes are those of the trimmed tensors, in elements.
    """
    hands: list[list[Piece]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    sized = [(math.prod(_shape(piece, target)), piece) for piece in work]
    for size, piece in sorted(sized, key=lambda entry: -entry[0]):
        rank = loads.index(min(loads))
        hands[rank].append(piece)
        loads[rank] += size
    return hands


def _shape(piece: Piece, target: Arch) -> tuple[int, ...]:
    whole = shape(piece.weight, target, piece.new_layer)
    return whole[len(whole) - len(piece.dims) :]


def check_tensors(reader: SliceReader, arch: Arch) -> None:
    """Compare the tensors of a checkpoint with the table of ``arch``, by name and shape.

    Raises:
        UserError: naming the first tensor that is missing, has another shape or has no row.
    """
    expected = {}
    for weight in weights(arch):
        if weight.per_layer and weight.key in reader.shapes and not arch.is_hybrid:
            expected[weight.key] = (count(weight, arch), *shape(weight, arch))
        elif weight.per_layer:
            for number, layer in enumerate(arch.layers_of(weight.kind)):
                expected[layer_key(weight.key, layer)] = shape(weight, arch, number)
        else:
            expected[weight.key] = shape(weight, arch)
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
                f"{reader.folder}: the tensor {key} has no row in the table of weights "
                "(megatron_ext/arch): it is not known how to trim it.",
                CHECKPOINT,
            )
