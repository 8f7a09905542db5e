"""Megatron checkpoint folders, read: found, checked and loaded under any layout.

    <root>/latest_checkpointed_iteration.txt     "100" or "release"
    <root>/iter_0000100/  or  <root>/release/    one torch_dist checkpoint of megatron-core
        common.pt .metadata metadata.json __*.distcp
        integrity.json         SHA-256 of the files above, in Megatron-LM's schema
        megatron_args.sh       the flags with which Megatron-LM builds this model
        tokenizer/             of a model that was imported, and of what came of it

``checkpoint_writer`` writes them. Loading compares every tensor's name and shape first, and
unpickles plain data only.
"""

import contextlib
import hashlib
import json
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch.distributed.checkpoint import CheckpointException

from megatron_ext import safe_load
from megatron_ext.arch import Arch
from megatron_ext.errors import CHECKPOINT, UserError, warn
from megatron_ext.together import gather

TRACKER = "latest_checkpointed_iteration.txt"
INTEGRITY = "integrity.json"
RELEASE = "release"
TOKENIZER = "tokenizer"
MAX_ROWS = 10
# Tensors of a checkpoint that are not weights: a run that does not ask for them may leave them.
NOT_WEIGHTS = (
    "optimizer.",
    "chained_",
    "rng_state",
    "rerun_state",
    "common_state",
    "distillation.",
)

safe_load.install()


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

    def tokenizer_files(self) -> dict[str, bytes]:
        """Return the files of its ``tokenizer`` folder, by the name under its own folder."""
        paths = sorted((self.folder / TOKENIZER).glob("*"))
        return {f"{TOKENIZER}/{path.name}": path.read_bytes() for path in paths}

    @property
    def arch(self) -> Arch:
        """The architecture of its model."""
        try:
            return Arch.from_args(self.args)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{self.folder}: the saved args do not describe a model ({error}).", CHECKPOINT
            ) from error


def iteration_name(iteration: int) -> str:
    """Return the folder name of an iteration."""
    return f"iter_{iteration:07d}"


def incomplete_reason(folder: Path) -> str | None:
    """Return why ``folder`` is no finished checkpoint, or None if it is one."""
    try:
        if "sharded_backend" not in json.loads((folder / "metadata.json").read_text()):
            return "metadata.json names no format"
    except (OSError, ValueError):
        return "metadata.json is missing or unreadable: the save did not finish"
    missing = [name for name in (".metadata", "common.pt") if not (folder / name).exists()]
    return f"{missing[0]} is missing" if missing else None


def find(root: str, step: int | None = None) -> Path | None:
    """Return the folder of a finished checkpoint, or None if there is none.

    Args:
        root: a checkpoint folder, or the folder above with its tracker file. Where the tracker is
            missing or wrong, the newest finished iteration counts, with a warning.
        step: take this iteration.

    Raises:
        UserError: ``step`` was asked for and is not there or not finished.
    """
    top = Path(root)
    if step is not None:
        folder = top / iteration_name(step)
        reason = incomplete_reason(folder) if folder.is_dir() else "there is no such folder"
        if reason:
            raise UserError(f"--ckpt-step {step}: {folder}: {reason}.", CHECKPOINT)
        return folder
    if incomplete_reason(top) is None:
        return top
    with contextlib.suppress(OSError):
        name = (top / TRACKER).read_text().strip()
        folder = top / (iteration_name(int(name)) if name.isdigit() else name)
        reason = incomplete_reason(folder)
        if name and reason is None:
            return folder
        warn(f"{top / TRACKER} names {name!r}, which cannot be used: {reason}.")
    finished = [f for f in sorted(top.glob("iter_*"), reverse=True) if not incomplete_reason(f)]
    if finished:
        warn(f"{top}: taking the newest finished checkpoint, {finished[0].name}.")
    return finished[0] if finished else None


def read(root: str, step: int | None = None) -> Checkpoint:
    """Return the checkpoint under ``root``, its weights still on disk. No collectives.

    Only plain data is unpickled.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = find(root, step)
    if folder is None:
        raise UserError(f"{root}: no finished checkpoint (iter_*/ or release/) here.", CHECKPOINT)
    try:
        common = torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's first lines advise to load it without protection.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or repr(error)
        raise UserError(
            f"{folder / 'common.pt'} cannot be read: {reason.splitlines()[0]}", CHECKPOINT
        ) from error
    if not isinstance(common, dict) or not isinstance(common.get("args"), Namespace):
        raise UserError(f"{folder}: no saved args: the model's sizes are not known.", CHECKPOINT)
    return Checkpoint(folder, common)


def verify_integrity(folder: Path) -> None:
    """Compare the files of ``folder`` with integrity.json. Collective: each rank hashes its share.

    Raises:
        UserError: on every rank, naming the first file that differs or is missing.
    """
    if not (folder / INTEGRITY).exists():
        warn(f"{folder}: no {INTEGRITY}; damage would go unnoticed.")
        return
    expected = json.loads((folder / INTEGRITY).read_text())["files"]
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    problems = []
    for name in sorted(expected)[rank::world_size]:
        path = folder / name
        if not path.exists():
            problems.append(f"{path} is missing")
        elif sha256(path) != expected[name]:
            problems.append(f"{path} is damaged: its SHA-256 differs from {INTEGRITY}")
    problems = [problem for part in gather(problems) for problem in part]
    if problems:
        raise UserError(f"{problems[0]}.", CHECKPOINT)


def load(folder: Path, state: ShardedStateDict) -> dict[str, Any]:
    """Read ``state`` (sharded tensors of any layout) in place. Collective.

    Returns:
        The state dict with everything that ``state`` asked for and the common part.

    Raises:
        UserError: on every rank, with a table, if tensors of the checkpoint and of ``state`` are
            not the same, name by name and shape by shape. Nothing is loaded then.
    """
    _check_tensors(folder, state)
    try:
        return dist_checkpointing.load(state, str(folder))
    except (Exception, CheckpointException) as error:
        reason = str(error).splitlines()[-1]
        raise UserError(f"{folder} cannot be read: {reason}", CHECKPOINT) from error


def sharded_tensors(state: ShardedStateDict) -> Iterator[ShardedTensor]:
    """Yield the tensors of ``state`` as they stand on disk: a gated MLP's two halves are two."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from sharded_tensors({"parts": value.build()})
        elif isinstance(value, ShardedTensor):
            yield value


def _check_tensors(folder: Path, state: ShardedStateDict) -> None:
    wanted = {tensor.key: tuple(tensor.global_shape) for tensor in sharded_tensors(state)}
    for others in gather(wanted):
        wanted |= others
    try:
        metadata = dist_checkpointing.load_tensors_metadata(str(folder))
    except Exception as error:
        raise UserError(f"{folder} cannot be read: {error}", CHECKPOINT) from error
    found = {key: tuple(tensor.global_shape) for key, tensor in metadata.items()}
    keys = [*wanted, *(k for k in found if k not in wanted and not k.startswith(NOT_WEIGHTS))]
    differing = [key for key in keys if found.get(key) != wanted.get(key)]
    if not differing:
        return
    rows = [("tensor", "checkpoint", "this model")]
    rows += [(key, _shape(found.get(key)), _shape(wanted.get(key))) for key in differing[:MAX_ROWS]]
    if len(differing) > MAX_ROWS:
        rows += [(f"... and {len(differing) - MAX_ROWS} more", "", "")]
    hint = (
        " Only optimizer state differs: give the flags that it was saved with (precision, "
        "--use-distributed-optimizer), or leave it with --no-load-optim or --finetune."
    ) * all(key.startswith("optimizer.") for key in differing)
    table = "\n".join(f"  {name:64} {theirs:>16} {ours:>16}" for name, theirs, ours in rows)
    raise UserError(f"{folder} does not fit this model.{hint}\n{table}", CHECKPOINT)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shape(shape: Iterable[int] | None) -> str:
    return "-" if shape is None else str(list(shape))
