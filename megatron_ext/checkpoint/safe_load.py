"""Reading torch_dist checkpoints without running code that a file brings along.

torch reads a checkpoint's ``.metadata`` with ``pickle.load`` and megatron-core reads its objects
with ``torch.load(weights_only=False)``: both run whatever a file asks for. Here only the classes
that such a file needs are known. ``trust`` (the flag --trust-checkpoint) lifts that.
"""

import functools
import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import _create_read_items

from megatron_ext.checkpoint.unpickling import ALLOWED, COMMON, COMMON_OBJECT, HINT, is_trusted


class Unknown:
    """Stands in for an object of a class that this megatron-core does not have; holds nothing."""

    def __init__(self, *args: Any):
        """Drop what it was made of."""

    def __setstate__(self, state: Any) -> None:
        """Drop what it held."""


class _AnyUnpickler(pickle.Unpickler):
    """Builds whatever it is asked for, ``Unknown`` where that is not installed."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return Unknown


def load_plain(file: Path | io.BytesIO) -> Any:
    """Return what ``torch.save`` wrote, tensors on the CPU: plain data, and megatron-core's enums.

    A class of a newer Megatron, as args hold them, becomes ``Unknown``: none of its code is there.

    Raises:
        pickle.UnpicklingError: it asks for something else.
    """
    if is_trusted():
        module = SimpleNamespace(__name__="pickle", Unpickler=_AnyUnpickler)
        return torch.load(file, map_location="cpu", weights_only=False, pickle_module=module)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    for name in names:
        if not name.startswith("megatron."):
            raise pickle.UnpicklingError(f"it asks for {name}, which is refused; {HINT}")
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with torch.serialization.safe_globals([(Unknown, name) for name in names]):
        return torch.load(file, map_location="cpu", weights_only=True)


def place_of_common(folder: Path) -> Path:
    """Return where a checkpoint keeps what is not sharded: a file, or an object among tensors."""
    is_file = (folder / COMMON).exists()
    return folder / (COMMON if is_file else COMMON_OBJECT)


def load_common(folder: Path) -> dict[str, Any]:
    """Return the part of a checkpoint that is not sharded: ``args``, ``iteration``, ... (plain).

    Raises:
        FileNotFoundError: it has none.
        pickle.UnpicklingError: as ``load_plain``.
    """
    if (folder / COMMON).exists():
        return load_plain(folder / COMMON)
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    entry = metadata.state_dict_metadata.get(COMMON_OBJECT)
    if entry is None:
        raise FileNotFoundError(f"neither {COMMON} nor {COMMON_OBJECT} is there")
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict, planner.load_bytes = {}, functools.partial(_load_bytes, planner)
    # Not torch's load(), which wraps what goes wrong in more than an Exception.
    items = _create_read_items(COMMON_OBJECT, entry, io.BytesIO())
    reader.read_data(LoadPlan(items), planner).wait()
    (common,) = planner.state_dict[COMMON_OBJECT]
    return common


# What Transformer Engine's layers pickle into their ``_extra_state``: a recipe of FP8, and scales.
ALLOWED_IN_EXTRA_STATE = {
    "collections": {"OrderedDict"},
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "transformer_engine.common.recipe": {
        "DelayedScaling",
        "Float8BlockScaling",
        "Float8CurrentScaling",
        "Format",
        "MMParams",
        "MXFP8BlockScaling",
        "QParams",
        "_FormatHelper",
    },
}


class PlainUnpickler(pickle.Unpickler):
    """Builds plain data and the classes of ``ALLOWED``; anything else is an ``UnpicklingError``."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that a checkpoint's metadata may name."""
        plain = module == "torch" and isinstance(
            getattr(torch, name, None), torch.dtype | torch.layout
        )
        if not plain and name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused; {HINT}")
        return super().find_class(module, name)


def load_metadata(file: BinaryIO) -> Metadata:
    """Return what a ``.metadata`` file says.

    Raises:
        pickle.UnpicklingError: it holds something else than metadata (``PlainUnpickler``); a
            damaged file raises whatever its bytes lead to.
    """
    metadata = (pickle.Unpickler if is_trusted() else PlainUnpickler)(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds {type(metadata).__name__}, not metadata")
    return metadata


def _read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    """Stand in for ``FileSystemReader.read_metadata``."""
    with Path(self._get_metadata_path(kwargs.get("rank"))).open("rb") as file:
        metadata = load_metadata(file)
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """Stand in for a planner's ``load_bytes``, which would unpickle anything."""
    found, key = load_plain(value), read_item.dest_index.fqn
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[key], found)
    else:
        self.state_dict[key] = found


def install() -> None:
    """Let every reader of torch_dist checkpoints in this process refuse what is not plain data."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import serialization

    FileSystemReader.read_metadata = _read_metadata
    DefaultLoadPlanner.load_bytes = _load_bytes  # of megatron-core's planner too
    for module in (dist_checkpointing, serialization):
        module.load_common_state_dict = lambda folder: load_common(Path(folder))


# What a pickled tensor asks for, and what megatron-core from 0.19 on puts in its place.
TENSOR_READERS = {
    ("torch.storage", "_load_from_bytes"),
    ("megatron.core.safe_globals", "safe_load_from_bytes"),
}


class _ExtraStateUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in TENSOR_READERS:
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        if name not in ALLOWED_IN_EXTRA_STATE.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused; {HINT}")
        return super().find_class(module, name)


def check_extra_state(state: Any) -> None:
    """Refuse an ``_extra_state`` that would run code: Transformer Engine unpickles its bytes.

    Args:
        state: [n] uint8; of old versions a file in memory, of ``torch.save``; or None.

    Raises:
        pickle.UnpicklingError: it asks for something else than a recipe and tensors.
    """
    if is_trusted():
        return
    if isinstance(state, io.BytesIO):
        state.seek(0)
        load_plain(state)
    elif isinstance(state, torch.Tensor) and state.numel():
        _ExtraStateUnpickler(io.BytesIO(state.cpu().numpy().tobytes())).load()
