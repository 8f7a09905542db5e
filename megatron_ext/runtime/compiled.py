"""C files of this package as shared libraries, compiled where they run when they are first needed.

They are kept in the user's cache folder, which no one else may write, each with its SHA-256; what
is not as it was built is built again. Every caller also has a way in torch: without a compiler, and
with MEGATRON_EXT_NATIVE=0, there is no library.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from megatron_ext.runtime.errors import note

HEADER = Path(__file__).with_name("vectors.h")  # of all C files
OPTIONS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-w")


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """Return the library of a C file, or None if it cannot be had here."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.environ.get("MEGATRON_EXT_NATIVE") == "0":
        return None
    if compiler is None:
        return _declined(source, "there is no C compiler")
    # A home folder may be shared by machines of other kinds, for which -march=native means others.
    machine = (" ".join(OPTIONS).encode(), _processor().encode())
    described = (source.read_bytes(), HEADER.read_bytes(), *machine)
    name = f"{source.stem}-{hashlib.sha256(b'|'.join(described)).hexdigest()[:16]}.so"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_ext"
        return ctypes.CDLL(str(_built(compiler, source, cache, name)))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:  # the last: without a home
        return _declined(source, str(error))


def _declined(source: Path, reason: str) -> None:
    """Say that torch computes instead: slower, and other in the last bits."""
    note(f"{source.name} is not compiled, torch computes instead: {reason.splitlines()[0]}.")


def _built(compiler: str, source: Path, cache: Path, name: str) -> Path:
    """Return the library in the folder ``cache``, built unless it is there as it was built.

    Raises:
        OSError: the folder is another user's or open to others, or cannot be written.
    """
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = cache.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{cache}: others may write code into it")
    path, seal = cache / name, cache / f"{name}.sha256"
    if path.exists() and seal.exists() and seal.read_text() == _sha256(path):
        return path
    with tempfile.TemporaryDirectory(dir=cache) as scratch:  # ranks may compile at once
        built, sealed = Path(scratch) / name, Path(scratch) / seal.name
        command = [compiler, *OPTIONS, f"-I{HEADER.parent}", str(source), "-o", str(built), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        sealed.write_text(_sha256(built))
        for each in (built, sealed):  # a crash of the machine leaves no empty library
            with each.open("rb") as file:
                os.fsync(file.fileno())
        # One compiler's output has one content: another rank's seal is right for it too.
        built.replace(path)
        sealed.replace(seal)
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _processor() -> str:
    """Return what tells processors with other instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features")
    return "\n".join(next((x for x in lines if x.startswith(name)), "") for name in names)
