"""Megatron checkpoint folders: found, read, checked, written aside and published.

    <root>/latest_checkpointed_iteration.txt     "100" or "release"
    <root>/iter_0000100/  or  <root>/release/    one torch_dist checkpoint of megatron-core
        common.pt .metadata metadata.json __*.distcp
        integrity.json         SHA-256 of the files above, in Megatron-LM's schema
        megatron_args.sh       the flags with which Megatron-LM builds this model

A checkpoint is published by renaming a finished folder and the tracker file is replaced atomically:
a run killed at any moment leaves the old checkpoint or the new one, never a mixture.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import ProcessGroup
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import CheckpointException

from megatron_ext import safe_load
from megatron_ext.arch import Arch
from megatron_ext.errors import CHECKPOINT, RUNTIME, UserError
from megatron_ext.together import gather, on_first_rank

TRACKER = "latest_checkpointed_iteration.txt"
INTEGRITY = "integrity.json"
RELEASE = "release"
MAX_ROWS = 10
# Tensors of a checkpoint that are not weights: a run that does not ask for them may leave them.
NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state", "common_state")

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
        _warn(f"{top / TRACKER} names {name!r}, which cannot be used: {reason}.")
    finished = [f for f in sorted(top.glob("iter_*"), reverse=True) if not incomplete_reason(f)]
    if finished:
        _warn(f"{top}: taking the newest finished checkpoint, {finished[0].name}.")
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
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder / 'common.pt'} cannot be read: {reason}", CHECKPOINT) from error
    if not isinstance(common.get("args"), Namespace):
        raise UserError(f"{folder}: no saved args: the model's sizes are not known.", CHECKPOINT)
    return Checkpoint(folder, common)


def verify_integrity(folder: Path) -> None:
    """Compare the files of ``folder`` with integrity.json. Collective: each rank hashes its share.

    Raises:
        UserError: on every rank, naming the first file that differs or is missing.
    """
    if not (folder / INTEGRITY).exists():
        _warn(f"{folder}: no {INTEGRITY}; damage would go unnoticed.")
        return
    expected = json.loads((folder / INTEGRITY).read_text())["files"]
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    problems = []
    for name in sorted(expected)[rank::world_size]:
        path = folder / name
        if not path.exists():
            problems.append(f"{path} is missing")
        elif _sha256(path) != expected[name]:
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


def save(
    root: str,
    name: str,
    state: ShardedStateDict,
    *,
    files: Mapping[str, str],
    dp_group: ProcessGroup | None = None,
    content_metadata: Mapping[str, Any] | None = None,
    keep: Callable[[str], bool] = lambda name: True,
) -> Path:
    """Write a checkpoint aside and publish it. Collective.

    Args:
        root: folder above the checkpoint; made if it is missing.
        name: of the checkpoint's folder, ``iter_*`` or ``release``. An older one is replaced.
        state: sharded tensors and, equal on all ranks, the common part with ``args``.
        files: text files to put beside the tensors, name to content.
        dp_group: the ranks with the same shards, which then write a share each; None: the first.
        content_metadata: how optimizer state is laid out, for the reader.
        keep: of the other ``iter_*`` folders, which to keep; the rest is deleted at the end.

    Raises:
        UserError: on every rank, if anything could not be written. Nothing is left behind, and
            what was there before stays.
    """
    top = Path(root)
    aside = top / f".{name}.tmp"
    final = top / name
    try:
        on_first_rank(lambda: _make_empty(aside))
        strategy = _WriteInProcess("torch_dist", 1, thread_count=1)
        if dp_group is not None:
            strategy = FullyParallelSaveStrategyWrapper(strategy, dp_group)
        dist_checkpointing.save(
            dict(state), str(aside), strategy, content_metadata=content_metadata
        )
        hashes = _hash_own_files(aside)
        on_first_rank(lambda: _finish(aside, final, hashes, files))
        on_first_rank(lambda: _remove_old(top, name, keep))
    except (Exception, CheckpointException) as error:  # torch derives it from BaseException
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        reason = str(error).strip().splitlines()[-1]
        free = shutil.disk_usage(top).free / 2**30 if top.exists() else 0
        raise UserError(
            f"--save {root}: {name} could not be written: {reason} ({free:.1f} GiB are free there)",
            RUNTIME,
        ) from error
    return final


class _WriteInProcess(TorchDistSaveShardedStrategy):
    """megatron-core's torch_dist format through torch's own writer.

    megatron-core writes from forked processes that report through a spawned one; when a rank is
    killed that one stays behind, and when a writer dies the save waits for ever.
    """

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=torch_checkpoint.FileSystemWriter(str(checkpoint_dir)),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _hash_own_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file, on every rank; each hashes the shards that it wrote."""
    rank = torch.distributed.get_rank()
    torch.distributed.barrier()
    own = list(folder.glob(f"__{rank}_*"))
    if rank == 0:
        own += [folder / name for name in ("common.pt", "metadata.json", ".metadata")]
    hashes: dict[str, str] = {}
    for part in gather({path.name: _sha256(path) for path in own}):
        hashes |= part
    return hashes


def _finish(aside: Path, final: Path, hashes: dict[str, str], files: Mapping[str, str]) -> None:
    integrity = json.dumps({"algorithm": "sha256", "files": hashes}, indent=1, sort_keys=True)
    for name, text in {INTEGRITY: integrity, **files}.items():
        (aside / name).write_text(text)
    for path in aside.iterdir():
        _fsync(path)
    old = final.with_name(f".{final.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    aside.rename(final)
    write_text(
        final.parent / TRACKER,
        str(int(final.name.removeprefix("iter_"))) if final.name != RELEASE else RELEASE,
    )
    _fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remove_old(top: Path, name: str, keep: Callable[[str], bool]) -> None:
    for folder in top.glob("iter_*"):
        if folder.name != name and not folder.is_symlink() and not keep(folder.name):
            shutil.rmtree(folder, ignore_errors=True)
    for left in top.glob(".*.tmp"):  # of a save that was killed
        shutil.rmtree(left, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` at once: a reader sees the old text or the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text)
    _fsync(aside)
    os.replace(aside, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shape(shape: Iterable[int] | None) -> str:
    return "-" if shape is None else str(list(shape))


def _warn(message: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"WARNING: {message}", file=sys.stderr, flush=True)
