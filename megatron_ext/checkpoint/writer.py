"""Megatron checkpoint folders, written: aside, hashed, published by a rename, then announced.

The tracker file is replaced last and at once: a run killed at any moment leaves the old checkpoint
or the new one, never a mixture. Saving an iteration that is there already moves the old folder
away first; killed between the two renames, the iterations before it are what is left.
"""

import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem

from megatron_ext.checkpoint.checkpoints import sha256
from megatron_ext.checkpoint.folder import INTEGRITY, RELEASE, TRACKER
from megatron_ext.runtime.collective_errors import gather, on_all_ranks, on_first_rank
from megatron_ext.runtime.errors import RUNTIME, UserError

# Name to content.
Files = Mapping[str, str | bytes]
# Key and global offset of a sharded tensor to what returns its content.
Readers = Mapping[tuple[str, tuple[int, ...]], Callable[[], Tensor]]


def save(
    root: str,
    name: str,
    state: ShardedStateDict,
    *,
    files: Files,
    dp_group: ProcessGroup | None = None,
    content_metadata: Mapping[str, Any] | None = None,
    keep: Callable[[str], bool] = lambda name: True,
    readers: Readers | None = None,
) -> Path:
    """Write a checkpoint aside and publish it. Collective.

    Args:
        root: folder above the checkpoint; made if it is missing.
        name: of the checkpoint's folder, ``iter_*`` or ``release``. An older one is replaced.
        state: sharded tensors and, equal on all ranks, the common part with ``args``.
        files: small files to put beside the tensors, name to content; folder/name for a folder.
        dp_group: the ranks with the same shards, which then write a share each; None: the first.
        content_metadata: how optimizer state is laid out, for the reader.
        keep: of the other ``iter_*`` folders, which to keep; the rest is deleted at the end.
        readers: where a tensor's content comes from that is on the device meta in ``state``; each
            is called when its turn to be written comes, and the result dropped.

    Raises:
        UserError: on every rank, if anything could not be written. Nothing is left behind, and
            what was there before stays.
    """
    top = Path(root)
    aside = top / f".{name}.tmp"
    final = top / name
    try:
        on_first_rank(lambda: _make_empty(aside))
        strategy = _WriteInProcess()
        strategy.readers = readers or {}
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
        for each in (error, *(e for e, _ in getattr(error, "failures", {}).values())):
            if isinstance(each, UserError):  # of what was to be written: a damaged source
                raise each from error
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
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

    readers: Readers = {}  # noqa: RUF012 - each save sets its own

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=torch_checkpoint.FileSystemWriter(str(checkpoint_dir)),
            planner=_ReadingPlanner(self.readers),
        )


class _ReadingPlanner(MCoreSavePlanner):
    """Calls the readers as torch's writer comes to their tensors."""

    def __init__(self, readers: Readers):
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self.readers = readers

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Return what to write of an item."""
        index = write_item.index
        read = self.readers.get((index.fqn, tuple(index.offset or ())))
        if read is None:
            return super().resolve_data(write_item)
        return read().view(write_item.tensor_data.chunk.sizes)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _hash_own_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file, on every rank; each hashes the shards that it wrote."""
    rank = torch.distributed.get_rank()
    torch.distributed.barrier()
    own = list(folder.glob(f"__{rank}_*"))
    if rank == 0:
        own += [folder / name for name in ("metadata.json", ".metadata")]
    hashes: dict[str, str] = {}
    for part in gather(on_all_ranks(lambda: {path.name: sha256(path) for path in own})):
        hashes |= part
    return hashes


def _finish(aside: Path, final: Path, hashes: dict[str, str], files: Files) -> None:
    integrity = json.dumps({"algorithm": "sha256", "files": hashes}, indent=1, sort_keys=True)
    for name, content in {INTEGRITY: integrity, **files}.items():
        path = aside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    for path in aside.rglob("*"):
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
        is_ours = folder.name.removeprefix("iter_").isdigit() and not folder.is_symlink()
        if is_ours and folder.name != name and not keep(folder.name):
            shutil.rmtree(folder, ignore_errors=True)
    for left in top.glob(".*.tmp"):  # of a save that was killed
        shutil.rmtree(left, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` at once: a reader sees the old text or the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text)
    _fsync(aside)
    os.replace(aside, path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
