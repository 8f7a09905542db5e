"""C files of this package as shared libraries, compiled where they run when they are first needed.

They are kept in the user's cache folder. Every caller also has a way in torch: without a compiler,
and with MEGATRON_EXT_NATIVE=0, there is no library.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

HEADER = Path(__file__).with_name("vectors.h")  # of all C files
OPTIONS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-w")


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """Return the library of a C file, or None if it cannot be had here."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.environ.get("MEGATRON_EXT_NATIVE") == "0" or compiler is None:
        return None
    # A home folder may be shared by machines of other kinds, for which -march=native means others.
    machine = (" ".join(OPTIONS).encode(), _processor().encode())
    described = (source.read_bytes(), HEADER.read_bytes(), *machine)
    name = f"{source.stem}-{hashlib.sha256(b'|'.join(described)).hexdigest()[:16]}.so"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_ext"
        if not (cache / name).exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:  # ranks may compile at once
                built = Path(scratch) / name
                include = f"-I{HEADER.parent}"
                command = [compiler, *OPTIONS, include, str(source), "-o", str(built), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                built.replace(cache / name)
        return ctypes.CDLL(str(cache / name))
    except (OSError, subprocess.SubprocessError, RuntimeError):  # the last: a user without a home
        return None


def _processor() -> str:
    """Return what tells processors with other instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features")
    return "\n".join(next((x for x in lines if x.startswith(name)), "") for name in names)
