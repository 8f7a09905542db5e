"""The checkpoints of a folder and what they say of themselves: no torch, no weights."""

import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ext.arch import Arch
from megatron_ext.runtime.errors import CHECKPOINT, UserError, warn
from megatron_ext.runtime.files import is_inside
from megatron_ext.runtime.texts import parse_json

TRACKER = "latest_checkpointed_iteration.txt"
INTEGRITY = "integrity.json"
RELEASE = "release"
TOKENIZER = "tokenizer"
NEMO_FOLDERS = ("weights", "model_weights")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk and what it says of itself."""

    folder: Path
    common: dict[str, Any]
    """The part that is not sharded: ``args``, ``iteration``, schedule, ..."""

    @property
    def args(self) -> dict[str, Any]:
        """The flags saved with it, by Megatron-LM's names."""
        return vars(self.common["args"])

    @property
    def iteration(self) -> int:
        """Optimizer steps behind it; 0 for a release (pruned or converted weights)."""
        return int(self.common.get("iteration", 0))

    @property
    def hf_config(self) -> dict[str, Any]:
        """The config.json of the Hugging Face model that it comes from; empty of any other."""
        return self.args.get("hf_config") or {}

    @property
    def knows_tokens(self) -> bool:
        """Whether it says how many tokens its tokenizer has.

        Megatron-LM saves what was typed as --vocab-size, if anything; and an imported model that
        had no tokenizer beside it counts every row.
        """
        is_counted = "tokenizer_sha256" in self.args or "tokenizer_type" not in self.args
        return is_counted and self.args.get("vocab_size") is not None

    @property
    def tokens_without_row(self) -> int:
        """Number of tokens of its own tokenizer beyond the rows of the imported model."""
        return self.args.get("tokens_without_row") or 0

    @property
    def origin(self) -> dict[str, Any]:
        """Args of this checkpoint that every one made from it keeps."""
        return {name: self.args.get(name) for name in ("hf_config", "tokens_without_row")}

    def with_tokens(self, vocab_size: int) -> "Checkpoint":
        """Return it with the number of its tokens, if it does not know; rows behind are padding."""
        if self.knows_tokens or vocab_size > self.args["padded_vocab_size"]:
            return self
        tokens = {"vocab_size": vocab_size, "tokenizer_sha256": None}
        return replace(self, common={**self.common, "args": Namespace(**{**self.args, **tokens})})

    def tokenizer_files(self) -> dict[str, bytes]:
        """Return the files of its ``tokenizer`` folder, by the name under its own folder."""
        top = self.folder / TOKENIZER
        paths = sorted(path for path in top.rglob("*") if path.is_file())
        for path in paths:
            if not is_inside(path, top):
                raise UserError(
                    f"{path} is a link out of its folder, to {path.resolve()}: it would be copied "
                    "beside every checkpoint; put the file itself there.",
                    CHECKPOINT,
                )
        return {p.relative_to(self.folder).as_posix(): p.read_bytes() for p in paths}

    @property
    def arch(self) -> Arch:
        """The architecture of its model."""
        try:
            return Arch.from_args(self.args)
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{self.folder}: the saved args do not describe a model ({error}).", CHECKPOINT
            ) from error


def iteration_name(iteration: int) -> str:
    """Return the folder name of an iteration."""
    return f"iter_{iteration:07d}"


def incomplete_reason(folder: Path) -> str | None:
    """Return why ``folder`` is no finished checkpoint, or None if it is one.

    Raises:
        UserError: it cannot be read: whether it is one is not known.
    """
    try:
        metadata = parse_json(_text_if_there(folder / "metadata.json") or "")
    except ValueError:
        return "metadata.json is missing or unreadable: the save did not finish"
    if not isinstance(metadata, dict) or "sharded_backend" not in metadata:
        return "metadata.json names no format"
    is_there = _unless_absent(lambda: (folder / ".metadata").stat())
    return None if is_there else ".metadata is missing"


def iterations(root: str) -> list[Path]:
    """Return the ``iter_*`` folders under ``root``, finished or not, the newest first.

    Raises:
        UserError: ``root`` cannot be read.
    """
    names = _unless_absent(lambda: os.listdir(root)) or []
    return [Path(root) / name for name in sorted(names, reverse=True) if name.startswith("iter_")]


def _text_if_there(path: Path) -> str | None:
    return _unless_absent(lambda: path.read_text(errors="replace"))


def _unless_absent[T](action: Callable[[], T]) -> T | None:
    """Return ``action()``, or None if its file is not there.

    Whoever takes a file that cannot be read for one that is not there begins a run anew, and
    erases what was saved.
    """
    try:
        return action()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read: {error.strerror}.", CHECKPOINT
        ) from error


def find(root: str, step: int | None = None) -> Path | None:
    """Return the folder of a finished checkpoint, or None if there is none.

    Args:
        root: a checkpoint folder, or the folder above with its tracker file, or NeMo's folder
            above weights/. Where the tracker is missing or wrong, the newest finished iteration
            counts, with a warning.
        step: take this iteration.

    Raises:
        UserError: ``step`` was asked for and is not there or not finished; what is there cannot
            be read.
    """
    top = Path(root)
    if step is not None:
        folder = top / iteration_name(step)
        reason = incomplete_reason(folder) if folder.is_dir() else "there is no such folder"
        if reason:
            raise UserError(f"--ckpt-step {step}: {folder}: {reason}.", CHECKPOINT)
        return folder
    for folder in (top, *(top / name for name in NEMO_FOLDERS)):
        if incomplete_reason(folder) is None:
            return folder
    name = (_text_if_there(top / TRACKER) or "").strip()
    if name:
        folder = top / (iteration_name(int(name)) if name.isdigit() else name)
        reason = incomplete_reason(folder)
        if reason is None:
            return folder
        warn(f"{top / TRACKER} names {name!r}, which cannot be used: {reason}.")
    finished = [folder for folder in iterations(root) if not incomplete_reason(folder)]
    if finished:
        warn(f"{top}: taking the newest finished checkpoint, {finished[0].name}.")
    return finished[0] if finished else None


def locate(root: str, step: int | None = None) -> Path:
    """Return the folder of a finished checkpoint, as ``find``.

    Raises:
        UserError: there is none.
    """
    folder = find(root, step)
    if folder is None:
        raise UserError(f"{root}: no finished checkpoint (iter_*/ or release/) here.", CHECKPOINT)
    return folder
