"""Statistics and gradients of rows of logits in C, on CPUs; functions as in ``native``.

Float32 or bfloat16, both models alike. Threads change no bit of a result.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.distillation.chunks import LOG2_E
from megatron_ext.distillation.native import MOMENTS
from megatron_ext.runtime.compiled import library

SOURCE = Path(__file__).with_name("losses_cpu.c")
KINDS = {torch.float32: "f32", torch.bfloat16: "bf16"}
# In the order of the enumerations in C.
MOMENT_NUMBERS = {name: number for number, name in enumerate(MOMENTS)}
LOSSES = ("forward-kl", "reverse-kl", "mse", "cosine", "jsd")


def takes(student: Tensor, teacher: Tensor) -> bool:
    """Whether there is a compiler, and kernels for these dtypes."""
    return student.dtype == teacher.dtype and student.dtype in KINDS and library(SOURCE) is not None


def row_stats(
    student: Tensor, teacher: Tensor, temperature: float, columns: int, moments: str
) -> Tensor:
    """Return [4 + m, S, B] float32."""
    stats = torch.empty(4 + MOMENTS[moments], *student.shape[:-1], dtype=torch.float32)
    logits = student, teacher, temperature, columns
    _call("row_stats", *logits, MOMENT_NUMBERS[moments], stats)
    return stats


def mixture_sums(
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    temperature: float,
    columns: int,
    beta: float,
) -> Tensor:
    """Return [2, S, B] float32."""
    sums = torch.empty_like(stats[:2])
    _call("mixture_sums", student, teacher, temperature, columns, stats, beta, sums)
    return sums


def gradient(
    loss: str,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    scale: Tensor,
    temperature: float,
    columns: int,
    beta: float,
) -> Tensor:
    """Return the gradient of the student's logits, [S, B, v]."""
    result = torch.empty_like(student)
    logits = student, teacher, temperature, columns
    _call("gradient", *logits, LOSSES.index(loss), stats, scale, beta, result)
    return result


def _call(name, student, teacher, temperature, columns, *others) -> None:
    """Call a function of the C file: what all three take first, and then its own arguments."""
    sizes = [student[..., 0].numel(), student.size(-1), teacher.size(-1), columns]
    scale, threads = ctypes.c_float(LOG2_E / temperature), torch.get_num_threads()
    held = [x.contiguous() if isinstance(x, Tensor) else x for x in (student, teacher, *others)]
    s, t, *own = (_argument(x) for x in held)
    function = getattr(library(SOURCE), f"{name}_{KINDS[student.dtype]}")
    function(s, t, *map(ctypes.c_long, sizes), scale, threads, *own)


def _argument(value: Tensor | float | int) -> ctypes._SimpleCData:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value)
