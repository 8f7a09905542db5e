"""Files that appear complete or not at all, and folders that one run writes at a time."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from socket import gethostname
from typing import TextIO

from safetensors import SafetensorError

from megatron_ext.runtime.errors import UserError, warn

LOCK = ".lock"
# Held to the end of the process, by path: closing a file gives its lock back.
_held: dict[str, TextIO] = {}


def hold(folder: str | os.PathLike, flag: str) -> None:
    """Keep other runs from writing into ``folder`` while this process lives. On one rank.

    The kernel gives the lock back when the process ends, however that is, and NFS when its machine
    does: no lock is ever stale. A file system without locks is warned of.

    Args:
        folder: made if it is missing.
        flag: that names it, for messages.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    path = Path(folder).resolve() / LOCK
    if str(path) in _held:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {error}.") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            warn(f"{flag} {folder}: no lock ({error.strerror}): start no other run on it.")
            return
        file.seek(0)
        holder = " ".join(file.read().split()) or "unknown"
        raise UserError(
            f"{flag} {folder} is in use by another run ({holder}): wait for its end, stop it, or "
            "take another folder."
        ) from error
    _held[str(path)] = file
    file.truncate(0)
    job = os.environ.get("SLURM_JOB_ID", "none")
    print(
        f"host {gethostname()} pid {os.getpid()} job {job} since {datetime.now():%F %T}", file=file
    )
    file.flush()


@contextmanager
def written_aside(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path beside ``path``; what was written there takes its name if nothing went wrong.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.umask(umask := os.umask(0))
        aside.chmod(0o666 & ~umask)  # safetensors writes what nobody else may read
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}.") from error
    finally:
        with suppress(OSError):
            aside.unlink()
