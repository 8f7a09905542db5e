"""The small files of a Hugging Face folder: its config, its tokenizer. Pure."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from megatron_ext.checkpoint.folder import Checkpoint
from megatron_ext.convert.text_tower import text_config
from megatron_ext.runtime.errors import CHECKPOINT, USAGE, UserError, warn
from megatron_ext.runtime.files import is_inside
from megatron_ext.runtime.texts import parse_json

CONFIG = "config.json"
# What is read as config and weights, and is not spoken of.
READ = (CONFIG, "*.safetensors", "*.safetensors.index.json", ".*")
# Names of what does not travel with a converted model. A pickle is code.
LEFT = {
    "weights": r"\.(safetensors|index\.json|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|npz)$",
    "code": r"\.(py|ipynb|sh|so|pkl|pickle)$",
    "card of the model before": r"^readme\.md$",
}
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "tekken.json", "*.model", "*.tiktoken")


def read_files(folder: Path) -> dict[str, bytes]:
    """Return what travels with a model of ``folder``, by its name there; warn of what does not."""
    names, left = carried(folder)
    if left:
        warn(f"{folder}: not carried along: {', '.join(left)}.")
    return {name: (folder / name).read_bytes() for name in names}


def carried(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of what travels with a model of ``folder``, and what does not and why.

    Tokenizer, chat templates, settings of generation, licence: everything that is no weights, no
    config, no code and no model card. A folder inside goes as a whole or not at all.

    Raises:
        UserError: a file of the tokenizer is a link out of the folder.
    """
    names, left = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if any(path.match(pattern) for pattern in READ):
            continue
        parts = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [part for part in parts if not part.is_dir()]
        reason = next(filter(None, (_reason(file, folder) for file in files)), None)
        if reason:
            left.append(f"{path.name} ({reason})")
        else:
            names += [file.relative_to(folder).as_posix() for file in files]
    return names, left


def _reason(file: Path, folder: Path) -> str | None:
    """Return why ``file`` does not travel, or None."""
    for reason, pattern in LEFT.items():
        if re.search(pattern, file.name, re.IGNORECASE):
            return reason
    if not is_inside(file, folder):
        if has_tokenizer([file.name]):
            raise UserError(
                f"{file} is a link out of its folder, to {file.resolve()}: a tokenizer is copied "
                "beside every checkpoint; put the file itself there.",
                CHECKPOINT,
            )
        return "a link out of the folder"
    return None if file.is_file() else "no file"


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether the files of a folder hold a tokenizer."""
    return any(fnmatch(name, pattern) for name in names for pattern in TOKENIZER)


def tokenizer_files(source: Checkpoint, folder: str | None) -> dict[str, bytes]:
    """Return what to put beside the weights: the tokenizer and its like."""
    place = Path(folder) if folder else source.folder / "tokenizer"
    if folder and not has_tokenizer(carried(place)[0]):
        raise UserError(f"--tokenizer-model {folder}: no tokenizer files there.", USAGE)
    files = read_files(place)
    if not has_tokenizer(files):
        warn(f"{source.folder} has no tokenizer beside it: give --tokenizer-model DIR to add one.")
    return files


def check_hf_folder(folder: str | Path) -> dict[str, Any]:
    """Return what config.json in ``folder`` holds, of a model of pictures that of its text.

    Raises:
        UserError: it is no folder on this machine, or has no such file.
    """
    if not Path(folder).is_dir():
        name = Path(folder).as_posix()
        is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        how = f": hf download {name} --local-dir DIR, then --hf DIR" if is_name else ""
        raise UserError(f"--hf {folder}: a folder on this machine is wanted{how}.", CHECKPOINT)
    return text_config(read_json(Path(folder) / CONFIG))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds."""
    with readable(path):
        value = parse_json(path.read_text())
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
