"""Args of a checkpoint, read without torch, whose import alone takes over a second.

For programs that look at sizes and touch no weights. Nothing is built but plain data and stand-ins
that do nothing. A file that asks for more, is damaged, or has no args is left to ``checkpoint``,
which knows more and says what is wrong.
"""

import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ext.checkpoint.folder import Checkpoint, locate
from megatron_ext.checkpoint.unpickling import ALLOWED, COMMON, COMMON_OBJECT
from megatron_ext.runtime import heavy

PLAIN = {"argparse.Namespace": Namespace, "collections.OrderedDict": OrderedDict}
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")


def glance(
    root: str, step: int | None = None, sizes: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Return what ``checkpoints.read`` does, with stand-ins for what is not plain in the args.

    Raises:
        UserError: as ``checkpoints.read``.
    """
    folder, common = locate(root, step), None
    with suppress(Exception):  # whatever it is, the other reader meets it too
        common = _common(folder)
    if isinstance(common, dict) and isinstance(common.get("args"), Namespace):
        return Checkpoint(folder, common)
    with heavy.imports():
        from megatron_ext.checkpoint import checkpoints
    return checkpoints.read(str(folder), sizes=sizes)


def _common(folder: Path) -> Any:
    if (folder / COMMON).exists():
        return _torch_saved((folder / COMMON).open("rb"))
    with (folder / ".metadata").open("rb") as file:
        metadata = _Unpickler(file).load()
    (info,) = (x for key, x in metadata.storage_data.items() if key.fqn == COMMON_OBJECT)
    if getattr(info, "transform_descriptors", None):
        raise ValueError("compressed")
    with (folder / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        content = file.read(info.length)
    (common,) = _torch_saved(BytesIO(content))
    return common


def _torch_saved(file: BinaryIO) -> Any:
    """Return what ``torch.save`` wrote, without its tensors."""
    with file, zipfile.ZipFile(file) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        return _Unpickler(BytesIO(archive.read(name))).load()


class _StandIn:
    """An object of a class that is not imported: what it holds, and no code."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *args: Any):
        """Drop what it was made of."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return a plain class or a stand-in, for what ``safe_load`` would not refuse."""
        if f"{module}.{name}" in PLAIN:
            return PLAIN[f"{module}.{name}"]
        is_tensor = name in DTYPES or name.endswith("Storage") or name == "_rebuild_tensor_v2"
        is_known = name in ALLOWED.get(module, ()) and module != "builtins"
        is_known |= module in ("torch", "torch._utils") and is_tensor
        if is_known or module.startswith("megatron."):
            return type(name, (_StandIn,), {})
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, key: Any) -> None:
        """Return nothing for a tensor's numbers."""
