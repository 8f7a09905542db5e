"""The folder of sample indices that megatron-core builds: it appears by one rename, sealed.

``<parent>/<key>`` holds its files and ``SEAL``, their SHA-256. One that is no longer as it was
built, after a crash of the machine or a full quota, is built again. One rank looks and writes.
"""

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

from megatron_ext.runtime.errors import DATA, UserError, warn
from megatron_ext.runtime.texts import parse_json

SEAL = "sha256.json"


def reserve(parent: str, described: str) -> tuple[str, str | None]:
    """Return the cache folder of what ``described`` says, and where it is not whole an empty one.

    Args:
        parent: folder of all caches.
        described: everything on which the indices depend.

    Raises:
        UserError: nothing can be written there.
    """
    cache = os.path.join(parent, hashlib.sha256(described.encode()).hexdigest()[:16])
    if os.path.isdir(cache):
        if is_whole(Path(cache)):
            return cache, None
        warn(f"{cache} is not as it was built: it is built again.")
    scratch = f"{cache}.{socket.gethostname()}-{os.getpid()}"
    try:
        shutil.rmtree(cache, ignore_errors=True)
        os.makedirs(scratch, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{parent}: cannot write the index cache ({error.strerror}); name a writable folder "
            "with --data-cache-path.",
            DATA,
        ) from error
    return cache, scratch


def publish(scratch: str, cache: str) -> None:
    """Seal what was built in ``scratch`` and give it its name."""
    (Path(scratch) / SEAL).write_text(json.dumps(_hashes(Path(scratch))))
    try:
        os.rename(scratch, cache)
    except OSError:
        if not os.path.isdir(cache):
            raise
        shutil.rmtree(scratch)  # another job with the same data was faster


def is_whole(cache: Path) -> bool:
    """Whether the files of ``cache`` are those that were sealed."""
    try:
        return parse_json((cache / SEAL).read_text()) == _hashes(cache)
    except (OSError, ValueError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.iterdir() if path.name != SEAL]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
