"""Sums over positions in C, on CPUs; see ``native``."""

import ctypes
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.runtime.compiled import library

SOURCE = Path(__file__).with_name("sums_cpu.c")
# Aggregations over positions that there are kernels for: what they add is squared, or not.
SQUARED = {"mean": False, "l2": True}
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
STRIDED = (POINTER, LONG, LONG)
# left_out, positions, batch
WHICH = (POINTER, LONG, LONG)
ARGUMENTS = {
    "unit_sums": (*STRIDED, *WHICH, LONG, INT, POINTER, INT),
    "head_sums": (*STRIDED, *WHICH, LONG, LONG, INT, POINTER, INT),
    "change_sums": (*STRIDED, *STRIDED, *WHICH, LONG, POINTER, INT),
    "add_samples": (POINTER, POINTER, POINTER, LONG, LONG, INT, POINTER, POINTER),
}


def unit_sums(kind: str, tensors: Sequence[Tensor], left_out: Tensor | None) -> Tensor | None:
    """Return [1, B, c] float64 of [s, B, c], see ``native``."""
    units = tensors[0].size(2)
    return _sums("unit_sums", kind, tensors, left_out, units, units, SQUARED.get(kind))


def head_sums(
    kind: str, tensors: Sequence[Tensor], left_out: Tensor | None, *, channels: int
) -> Tensor | None:
    """Return [1, B, c] float64 of [s, B, c * D], see ``native``."""
    heads = tensors[0].size(2) // channels
    return _sums("head_sums", kind, tensors, left_out, heads, heads, channels, SQUARED.get(kind))


def change_sums(kind: str, tensors: Sequence[Tensor], left_out: Tensor | None) -> Tensor | None:
    """Return [1, B, 1] float64 of two [s, B, H], see ``native``."""
    if kind != "mean":
        return None
    return _sums("change_sums", kind, tensors, left_out, 1, tensors[0].size(2))


def _sums(
    name: str,
    kind: str,
    tensors: Sequence[Tensor],
    left_out: Tensor | None,
    units: int,
    *sizes: int,
) -> Tensor | None:
    first = tensors[0]
    if kind not in SQUARED or first.dtype not in DTYPES:
        return None
    if any(x.stride(2) != 1 or x.dtype != first.dtype for x in tensors):
        return None
    if (kernel := _function(name, f"_{DTYPES[first.dtype]}")) is None:
        return None
    positions, batch, _ = first.shape
    out = torch.empty(1, batch, units, dtype=torch.float64)
    places = itertools.chain(*((x.data_ptr(), x.stride(0), x.stride(1)) for x in tensors))
    which = None if left_out is None else left_out.data_ptr()
    kernel(*places, which, positions, batch, *sizes, out.data_ptr(), torch.get_num_threads())
    return out


def add_samples(
    totals: tuple[Tensor, Tensor], kind: str, sums: Tensor, num_positions: Tensor, weights: Tensor
) -> bool:
    """Add a micro-batch to the totals over samples, see ``native``."""
    if kind not in SQUARED or (kernel := _function("add_samples")) is None:
        return False
    inputs = [x.contiguous() for x in (sums, num_positions, weights)]
    kernel(
        *(x.data_ptr() for x in inputs),
        sums.size(1),
        sums.size(2),
        SQUARED[kind],
        *(x.data_ptr() for x in totals),
    )
    return True


@functools.cache
def _function(name: str, dtype: str = "") -> Callable | None:
    if (kernels := library(SOURCE)) is None:
        return None
    function = getattr(kernels, name + dtype)
    function.argtypes, function.restype = ARGUMENTS[name], None
    return function
