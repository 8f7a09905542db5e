"""Slices of the global tensors of a torch_dist checkpoint: no collectives, no model, any rank.

Layers come in two styles, and ``SliceReader.read_layer`` reads both:
    stacked      decoder.layers.mlp.linear_fc1.weight    [L, ...]
    per layer    decoder.layers.0.mlp.linear_fc1.weight  [...]
NeMo puts ``module.`` or ``model.`` in front of a model's tensors; here all go without.
"""

import pickle
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ext.arch import LAYER_PREFIXES, layer_key
from megatron_ext.checkpoint.safe_load import load_metadata
from megatron_ext.runtime.errors import CHECKPOINT, UserError

FIRST_WEIGHT = "embedding.word_embeddings.weight"
# Prefixes of the optimizer's tensors, whose names end alike.
NOT_A_MODEL = ("optimizer.", "chained_")
LAYER_NUMBER = re.compile(rf"({'|'.join(map(re.escape, LAYER_PREFIXES))})(\d+)\.")
# What torch raises on files that are missing, cut short or overwritten.
DAMAGE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    AssertionError,
    pickle.UnpicklingError,
)


class SliceReader:
    """Reads parts of a checkpoint's tensors. Each rank has its own.

    Whole saved chunks are read from disk (one layer of one tensor-parallel shard, as a rule) but
    only those that overlap a slice; one at a time is in memory beside the result.
    """

    def __init__(self, folder: str | Path):
        """Read the folder's ``.metadata``, plain data only.

        Raises:
            UserError: it is missing or damaged.
        """
        self.folder = Path(folder)
        path = self.folder / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = load_metadata(file)
            entries = metadata.state_dict_metadata
            self.prefix = model_prefix(entries)
            self._tensors = {
                key.removeprefix(self.prefix): entry
                for key, entry in entries.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            # Names of what is no tensor: <key>/shard_<place>_<shape>.
            objects = [k for k, x in entries.items() if not isinstance(x, TensorStorageMetadata)]
            self.objects = {key.removeprefix(self.prefix) for key in objects}
            self._names = {key.removeprefix(self.prefix): key for key in entries}
            self._files = metadata.storage_data
            self.shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
                key: (tuple(entry.size), entry.properties.dtype)
                for key, entry in self._tensors.items()
            }
        except DAMAGE as error:
            raise _damaged(path, error) from error
        self._reader = FileSystemReader(self.folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=False)

    def read(self, key: str, index: Sequence[slice], out: Tensor | None = None) -> Tensor:
        """Return ``tensor[index]`` of a global tensor, on the CPU in the checkpoint's dtype.

        Args:
            key: name of the tensor, one of ``shapes``.
            index: one slice per axis, step 1; bounds as in Python.
            out: a contiguous tensor that may be overwritten; where its shape and dtype fit, it is
                filled and returned, else a new one.

        Raises:
            UserError: a file is missing or damaged; the message names it.
        """
        entry = self._tensors[key]
        bounds = [part.indices(size)[:2] for part, size in zip(index, entry.size, strict=True)]
        offsets = torch.Size(start for start, _ in bounds)
        lengths = torch.Size(max(stop - start, 0) for start, stop in bounds)
        dtype = entry.properties.dtype
        if out is None or (out.shape, out.dtype) != (lengths, dtype):
            out = torch.empty(lengths, dtype=dtype)
        items = create_read_items_for_chunk_list(
            self._names[key], entry, [ChunkStorageMetadata(offsets, lengths)]
        )
        if sum(item.lengths.numel() for item in items) != lengths.numel():
            raise UserError(f"{self.folder}/.metadata lists no data for part of {key}.", CHECKPOINT)
        for item in items:
            self._read_chunk(item, out)
        return out

    def read_layer(
        self, key: str, layer: int, out: Tensor | None = None, *, expert: int | None = None
    ) -> Tensor:
        """Return one layer of the weight with the stacked name ``key``, whichever way it is stored.

        Args:
            key: ``decoder.layers.mlp.linear_fc1.weight`` and the like.
            layer: global number from 0.
            out: as for ``read``, without the axes of layers and experts.
            expert: of a weight of all experts, this one alone.
        """
        chosen = [] if expert is None else [expert]
        if key in self.shapes:
            chosen = [layer, *chosen]
        else:
            key = layer_key(key, layer)
        whole = [slice(None)] * (len(self.shapes[key][0]) - len(chosen))
        if out is not None:
            out = out.view(*[1] * len(chosen), *out.shape)
        part = self.read(key, [*(slice(i, i + 1) for i in chosen), *whole], out)
        return part.view(part.shape[len(chosen) :])

    @property
    def global_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors by name, layers stacked in either style.

        Raises:
            UserError: naming a tensor that a layer lacks, or has in another shape than others.
        """
        found: dict[str, tuple[int, ...]] = {}
        layers: dict[str, dict[int, tuple[int, ...]]] = {}
        for key, (size, _) in self.shapes.items():
            if match := LAYER_NUMBER.match(key):
                layers.setdefault(LAYER_NUMBER.sub(r"\1", key), {})[int(match[2])] = size
            else:
                found[key] = size
        for stacked, sizes in layers.items():
            ((usual, _),) = Counter(sizes.values()).most_common(1)
            for number in range(max(sizes) + 1):
                if sizes.get(number) != usual:
                    size = list(sizes[number]) if number in sizes else "not there"
                    raise UserError(
                        f"{self.folder}: {layer_key(stacked, number)} is {size}, in other layers "
                        f"it is {list(usual)}: layers that differ are not read here.",
                        CHECKPOINT,
                    )
            found[stacked] = (len(sizes), *usual)
        return found

    def read_shard(self, shard: ShardedTensor) -> Tensor:
        """Return the part of a global tensor that ``shard`` stands for, in its local shape.

        Shorter where the stored tensor ends before the shard, as a vocabulary with less padding.
        """
        index = [
            slice(start, start + length)
            for start, length in zip(
                shard.global_offset,
                (*[1] * shard.prepend_axis_num, *shard.local_shape),
                strict=True,
            )
        ]
        key, single = shard.key, shard.prepend_axis_num
        if key not in self.shapes:
            key, index, single = layer_key(key, shard.global_offset[0]), index[1:], single - 1
        part = self.read(key, index)
        return part.view(part.shape[single:])

    def _read_chunk(self, item: ReadItem, out: Tensor) -> None:
        path = self.folder / _file_of(item.storage_index, self._files)
        try:
            self._reader.read_data(LoadPlan([item]), _CopyInto(out)).wait()
        except DAMAGE as error:
            raise _damaged(path, error) from error


class _CopyInto(LoadPlanner):
    """Tells torch's reader where in one tensor the parts of chunks belong."""

    def __init__(self, out: Tensor):
        self.out = out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.out[tuple(slice(start, start + length) for start, length in place)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: ``resolve_tensor`` gave a view of the result."""


def model_prefix(names: Iterable[str]) -> str:
    """Return what stands in front of the names of a model's tensors: nothing, as a rule."""
    for name in names:
        if name.endswith(FIRST_WEIGHT) and not name.startswith(NOT_A_MODEL):
            return name.removesuffix(FIRST_WEIGHT)
    return ""


def _file_of(index: MetadataIndex, files: dict) -> str:
    return files[index].relative_path if index in files else ".metadata"


def _damaged(path: Path, error: Exception) -> UserError:
    reason = "it is missing" if isinstance(error, FileNotFoundError) else str(error) or repr(error)
    return UserError(f"{path} cannot be read: {reason.splitlines()[0]}.", CHECKPOINT)
