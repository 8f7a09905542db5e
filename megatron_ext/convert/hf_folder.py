"""A Hugging Face folder on disk: config.json, weights in safetensors, tokenizer files.

Pickled weights (pytorch_model.bin) are never opened.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_ext.convert.hf_files import CONFIG, check_hf_folder, read_json, readable
from megatron_ext.convert.text_tower import has_text, text_names
from megatron_ext.runtime.errors import CHECKPOINT, UserError, warn

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

ADAPTER = (
    "an adapter (LoRA), not a model: merge it into its model first, with peft's "
    "merge_and_unload() and save_pretrained()"
)

# safetensors' names of dtypes, and torch's.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class HfFolder:
    """Reads a folder one tensor at a time. No collectives; each rank has its own.

    Raises ``UserError`` everywhere, naming the file that is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        """Read config.json and the headers of all weight files."""
        self.folder = Path(folder)
        self.config = check_hf_folder(folder)
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in self._paths():
            with readable(path), safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    self._files[name] = path
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes[name] = DTYPES.get(part.get_dtype(), part.get_dtype())
        self._take_text()

    def _take_text(self) -> None:
        """Keep the tensors of the language model alone, under its names."""
        whole = read_json(self.folder / CONFIG)
        self._names = text_names(self.shapes, whole)
        if has_text(whole):
            left = len(self.shapes) - len(self._names)
            warn(f"{self.folder}: {left} tensors beside the language model, left out.")
            # The config says it of the whole, of the text, of both or of neither.
            self.config["tie_word_embeddings"] = "lm_head.weight" not in self._names
        self.shapes = {name: self.shapes[there] for name, there in self._names.items()}
        self.dtypes = {name: self.dtypes[there] for name, there in self._names.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU in its own dtype, which keeps its file mapped."""
        name = self._names[name]
        path = self._files[name]
        with readable(path), safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    def _paths(self) -> list[Path]:
        if (self.folder / WEIGHTS).exists():
            return [self.folder / WEIGHTS]
        if not (self.folder / INDEX).exists():
            if (self.folder / "adapter_config.json").exists():
                raise UserError(f"--hf {self.folder}: {ADAPTER}.", CHECKPOINT)
            pickled = sorted(path.name for path in self.folder.glob("pytorch_model*.bin"))
            hint = (
                f"{pickled[0]} is a pickle, which may run code when it is read: load it with "
                "transformers and save_pretrained() it as safetensors"
                if pickled
                else f"neither {WEIGHTS} nor {INDEX} is there"
            )
            raise UserError(f"--hf {self.folder}: {hint}.", CHECKPOINT)
        index = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(x, str) for x in index.values()):
            raise UserError(f"{self.folder / INDEX} has no weight_map.", CHECKPOINT)
        return [self.folder / name for name in sorted(set(index.values()))]


def header_of(
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
) -> dict[str, dict[str, Any]]:
    """Return the header of a safetensors file of these names, shapes and dtypes, without metadata.

    Tensors lie one behind the other, without gaps: the widest dtypes stand first, or others would
    not be aligned.

    Raises:
        ValueError: naming a tensor whose dtype is not written here.
    """
    names = {getattr(torch, theirs): name for name, theirs in DTYPES.items()}
    header, end = {}, 0
    for name, size, dtype in tensors:
        if dtype not in names:
            raise ValueError(f"{name} is {dtype}")
        start, end = end, end + math.prod(size) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(size), "data_offsets": [start, end]}
    return header


def write_weights(path: Path, header: Mapping[str, Any], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file: ``tensors`` on the CPU, in the order of ``header``, one by one."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in zip(header, tensors, strict=True):
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
