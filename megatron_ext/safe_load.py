"""Reading torch_dist checkpoints without running code that a file brings along.

torch reads a checkpoint's ``.metadata`` with ``pickle.load`` and megatron-core reads its objects
with ``torch.load(weights_only=False)``: both run whatever a file asks for. Here only the classes
that such a file needs are known.
"""

import io
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

# module: names. torch's dtypes and layouts are allowed on top of these.
ALLOWED = {
    "builtins": {"dict", "list", "set", "slice", "tuple"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}


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
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return super().find_class(module, name)


def load_metadata(file: BinaryIO) -> Metadata:
    """Return what a ``.metadata`` file says.

    Raises:
        pickle.UnpicklingError: it holds something else than metadata (``PlainUnpickler``); a
            damaged file raises whatever its bytes lead to.
    """
    metadata = PlainUnpickler(file).load()
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


def install() -> None:
    """Let every reader of torch_dist checkpoints in this process refuse what is not plain data."""
    from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner

    FileSystemReader.read_metadata = _read_metadata
    MCoreLoadPlanner.load_bytes = _load_bytes


def _load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """Stand in for ``MCoreLoadPlanner.load_bytes``: try the object as plain data first."""
    torch.load(value, map_location="cpu", weights_only=True)
    value.seek(0)
    DefaultLoadPlanner.load_bytes(self, read_item, value)


class _ExtraStateUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        if name not in ALLOWED_IN_EXTRA_STATE.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return super().find_class(module, name)


def check_extra_state(state: Any) -> None:
    """Refuse an ``_extra_state`` that would run code: Transformer Engine unpickles its bytes.

    Args:
        state: [n] uint8, or None.

    Raises:
        pickle.UnpicklingError: it asks for something else than a recipe and tensors.
    """
    if isinstance(state, torch.Tensor) and state.numel():
        _ExtraStateUnpickler(io.BytesIO(state.cpu().numpy().tobytes())).load()
