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
# Held to the end of the process, by path: closing a file gives its lock back. And whether its
# folder was made for it.
_held: dict[Path, tuple[TextIO, bool]] = {}


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
    take_lock(Path(folder) / LOCK, f"{flag} {folder}")


def lock_beside(path: str | os.PathLike) -> Path:
    """Return the lock of what appears as a whole: a file, or a folder that must not be there."""
    path = Path(path)
    return path.with_name(f".{path.name}{LOCK}")


def take_lock(lock: Path, name: str) -> None:
    """Hold the file ``lock``, whose folder is made; errors are those of ``hold`` about ``name``."""
    path = lock.absolute().parent.resolve() / lock.name
    if path in _held:
        return
    is_new = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"{name} cannot be written: {error}.") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            warn(f"{name}: no lock ({error.strerror}): start no other run on it.")
            return
        file.seek(0)
        holder = " ".join(file.read().split()) or "unknown"
        raise UserError(
            f"{name} is in use by another run ({holder}): wait for its end, stop it, or give "
            "another."
        ) from error
    if not _is_there(path, file):  # its holder has just ended, and removed it
        file.close()
        take_lock(lock, name)
        return
    _held[path] = file, is_new
    job = os.environ.get("SLURM_JOB_ID", "none")
    with suppress(OSError):  # a full disk: whoever comes reads "unknown"
        file.truncate(0)
        file.write(
            f"host {gethostname()} pid {os.getpid()} job {job} since {datetime.now():%F %T}\n"
        )
        file.flush()


def give_lock_back(lock: Path) -> None:
    """Remove a lock that this process holds, if it does, and a folder that was made for nothing."""
    path = lock.absolute().parent.resolve() / lock.name
    file, is_new = _held.pop(path, (None, False))
    if file is None:
        return
    with suppress(OSError):
        path.unlink()
    with suppress(OSError):
        file.close()
    if is_new:
        with suppress(OSError):  # what was to be written is there
            path.parent.rmdir()


def _is_there(path: Path, file: TextIO) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def is_inside(file: Path, folder: Path) -> bool:
    """Whether ``file`` of ``folder``, a link or not, is kept there: a link may lead to any file.

    The Hugging Face hub's cache links from snapshots/HASH/ to blobs/, which counts as inside.
    """
    home = folder.resolve()
    homes = [home, *[home.parents[1] / "blobs"] * (home.parent.name == "snapshots")]
    return any(file.resolve().is_relative_to(each) for each in homes)


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
