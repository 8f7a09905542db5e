"""The setting of the checks, their results, and the machine's facts."""

import functools
import importlib.metadata
import platform as machine
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ext.model.config import choose_transformer_impl
from megatron_ext.runtime import platform
from megatron_ext.runtime.platform import Platform

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class UnavailableError(Exception):
    """This machine lacks something that a check needs."""


@dataclass(frozen=True)
class Setup:
    """The device of the checks and the size of their models."""

    place: Platform
    quick: bool
    engine: bool
    """Whether Transformer Engine's layers can be built."""


@dataclass(frozen=True)
class Found:
    """The result of a check, as text; ``ok`` None for a measurement without a limit."""

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


@dataclass(frozen=True)
class Ceilings:
    """The two rates that nothing on this device exceeds for long."""

    copy: float
    """Bytes per second of a copy from memory to memory, those read and those written."""
    matmul: float
    """Operations per second of a bf16 matrix product of random numbers."""


@functools.cache
def ceilings(device: torch.device) -> Ceilings:
    """Measure the ceilings of ``device``, once per process: every figure is a share of them."""
    large = device.type == "cuda"
    source = torch.randn(2**28 if large else 2**20, device=device)
    copy = 2 * source.nbytes / seconds_of(functools.partial(torch.clone, source), device)
    size = 8192 if large else 128
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = seconds_of(functools.partial(torch.matmul, left, right), device)
    return Ceilings(copy, 2 * size**3 / product)


def ceiling_checks(setup: Setup) -> Checks:
    """Report the ceilings."""

    def measure() -> Found:
        found = ceilings(setup.place.device)
        return Found(
            f"copy {found.copy / 1e9:,.0f} GB/s, matmul {found.matmul / 1e12:,.1f} TFLOP/s"
        )

    yield "copy of 1 GiB, bf16 product of 8192 x 8192", measure


def seconds_of(action: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Return the median seconds of ``action`` after two calls that warm up.

    On a GPU an event before and one behind each call: what the host does meanwhile does not count
    as long as it keeps ahead.
    """
    for _ in range(2):
        action()
    if device.type != "cuda":
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            action()
            found.append(time.perf_counter() - start)
        return statistics.median(found)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in events:
        before.record()
        action()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) / 1000 for before, after in events)


def clock(device: torch.device) -> float:
    """Return the seconds of the clock once ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
