"""Where the checks run, what they return, and what the machine is."""

import importlib.metadata
import platform as machine
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ext import platform
from megatron_ext.model import choose_transformer_impl
from megatron_ext.platform import Platform

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class UnavailableError(Exception):
    """What a check needs is not on this machine."""


@dataclass(frozen=True)
class Setup:
    """Where checks run and how large they are."""

    place: Platform
    quick: bool
    engine: bool
    """Whether Transformer Engine's layers can be built."""


@dataclass(frozen=True)
class Found:
    """What a check found, as text; ``ok`` None for a measurement without a limit."""

    result: str
    limit: str = ""
    ok: bool | None = None


Checks = Iterator[tuple[str, Callable[[], Found]]]


def prepare(device: str, *, quick: bool) -> Setup:
    """Return the setup of this process. Joins a process group of one."""
    place = platform.initialize(device=device)
    try:
        engine = choose_transformer_impl(None, place.device) == "transformer_engine"
    except Exception:  # installed and broken; the rows of the part say why
        engine = True
    return Setup(place, quick, engine)


def facts(setup: Setup) -> dict[str, str]:
    """Return hardware, versions and commit."""
    found = {"device": machine.processor() or machine.machine()}
    if setup.place.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setup.place.device)
        found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    found["python, torch, CUDA"] = (
        f"{machine.python_version()}, {torch.__version__}, {torch.version.cuda or 'none'}"
    )
    names = ("megatron-core", "transformer-engine", "triton", "apex")
    found["packages"] = ", ".join(f"{name} {_version(name)}" for name in names)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    found["commit"] = done.stdout.strip() or "unknown (no git here)"
    found["date"] = time.strftime("%Y-%m-%d")
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def need_engine(setup: Setup) -> None:
    """Raise ``UnavailableError`` without Transformer Engine."""
    if not setup.engine:
        raise UnavailableError("no Transformer Engine on a GPU")


def clock(device: torch.device) -> float:
    """Return the seconds of the clock once ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
