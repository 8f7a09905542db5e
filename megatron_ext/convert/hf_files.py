"""The small files of a Hugging Face folder: its config, its tokenizer. Pure."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from megatron_ext.checkpoint.folder import Checkpoint
from megatron_ext.runtime.errors import CHECKPOINT, USAGE, UserError, warn

CONFIG = "config.json"
# What a folder holds beside config and weights, and what travels with a converted model.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def read_files(folder: Path) -> dict[str, bytes]:
    """Return those of ``TOKENIZER_FILES`` that ``folder`` holds, by name."""
    paths = (folder / name for name in TOKENIZER_FILES)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def tokenizer_files(source: Checkpoint, folder: str | None) -> dict[str, bytes]:
    """Return what to put beside the weights: the tokenizer and its like."""
    place = Path(folder) if folder else source.folder / "tokenizer"
    files = read_files(place)
    if folder and not files:
        raise UserError(f"--tokenizer-model {folder}: no tokenizer files there.", USAGE)
    if not files:
        warn(f"{source.folder} has no tokenizer beside it: give --tokenizer-model DIR to add one.")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds."""
    with readable(path):
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    return value


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say of a file that is read here and missing or damaged that it is."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing.", CHECKPOINT) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read: {str(error).splitlines()[0]}", CHECKPOINT
        ) from None
