"""The statistics and the gradient of KL in one pass each: in C on CPUs, in Triton on CUDA.

Without a compiler (``compiled``), without Triton and for other dtypes the functions here decline,
and ``steps`` computes in torch. MEGATRON_EXT_NATIVE=0 has them always decline.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from megatron_ext.compiled import library
from megatron_ext.distillation.chunks import LOG2_E

SOURCE = Path(__file__).with_name("kl_cpu.c")
KINDS = {torch.float32: "f32", torch.bfloat16: "bf16"}
TRITON_KINDS = {*KINDS, torch.float16}


def kl_stats(student: Tensor, teacher: Tensor, temperature: float, columns: int) -> Tensor | None:
    """Return this rank's [5, S, B] float32 as ``steps`` defines them, or None."""
    if not _fits(student, teacher, columns):
        return None
    if student.is_cuda:
        kernels = _triton_kernels()
        return kernels and kernels.kl_stats(student, teacher, temperature, columns)
    kernel = _c_kernel("kl_stats", student.dtype)
    if kernel is None:
        return None
    stats = torch.empty(5, *student.shape[:-1])
    kernel(*_rows(student, teacher, columns, temperature), _pointer(stats), torch.get_num_threads())
    return stats


def kl_gradient(
    student: Tensor, teacher: Tensor, rows: Tensor, scale: Tensor, temperature: float, columns: int
) -> Tensor | None:
    """Return the gradient of the student's logits, [S, B, v] in their dtype, or None.

    Args:
        student: [S, B, v].
        teacher: [S, B, v].
        rows: [4, S, B] float32, maxima and sums of exponentials of both over all ranks.
        scale: [S, B] float32, the factor of each row.
        temperature: T.
        columns: c.
    """
    if not _fits(student, teacher, columns):
        return None
    if student.is_cuda:
        kernels = _triton_kernels()
        return kernels and kernels.kl_gradient(student, teacher, rows, scale, temperature, columns)
    kernel = _c_kernel("kl_gradient", student.dtype)
    if kernel is None:
        return None
    gradient = torch.empty_like(student)
    rows, scale = rows.contiguous(), scale.contiguous()
    kernel(
        *_rows(student, teacher, columns, temperature),
        _pointer(rows),
        _pointer(scale),
        _pointer(gradient),
        torch.get_num_threads(),
    )
    return gradient


def _fits(student: Tensor, teacher: Tensor, columns: int) -> bool:
    tensors = (student, teacher)
    kinds = TRITON_KINDS if student.is_cuda else KINDS
    same = student.dtype == teacher.dtype and student.dtype in kinds
    return columns > 0 and same and all(x.is_contiguous() for x in tensors)


def _c_kernel(name: str, dtype: torch.dtype) -> Callable | None:
    library = _library()
    return None if library is None else getattr(library, f"{name}_{KINDS[dtype]}")


@functools.cache
def _triton_kernels() -> ModuleType | None:
    """Return the module of Triton kernels, or None without Triton."""
    if os.environ.get("MEGATRON_EXT_NATIVE") == "0":
        return None
    try:
        from megatron_ext.distillation import kl_triton
    except ImportError:
        return None
    return kl_triton


def _rows(student: Tensor, teacher: Tensor, columns: int, temperature: float) -> list:
    sizes = [student[..., 0].numel(), student.size(-1), teacher.size(-1), columns]
    scale = ctypes.c_float(LOG2_E / temperature)
    return [_pointer(student), _pointer(teacher), *map(ctypes.c_long, sizes), scale]


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None if they cannot be had here."""
    return library(SOURCE)
