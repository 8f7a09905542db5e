"""The statistics and the gradient of KL as Triton kernels, a program for each row.

As ``kl_cpu.c``: maxima first, then sums centred on them; products are arranged so that two equal
models give zero. Functions as in ``native``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.distillation.chunks import LOG2_E

BLOCK = 4096


@triton.jit
def _stats_kernel(
    student, teacher, stats, rows, s_width, t_width, columns, scale, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    s_row, t_row = student + row * s_width, teacher + row * t_width
    lane = tl.arange(0, block)
    s_best = tl.full([block], float("-inf"), tl.float32)
    t_best = tl.full([block], float("-inf"), tl.float32)
    for start in range(0, columns, block):
        is_real = start + lane < columns
        s = tl.load(s_row + start + lane, mask=is_real, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + start + lane, mask=is_real, other=float("-inf")).to(tl.float32)
        s_best, t_best = tl.maximum(s_best, s), tl.maximum(t_best, t)
    s_max, t_max = tl.max(s_best, 0), tl.max(t_best, 0)
    s_sum = tl.zeros([block], tl.float32)
    t_sum = tl.zeros([block], tl.float32)
    dot = tl.zeros([block], tl.float32)
    for start in range(0, columns, block):
        is_real = start + lane < columns
        s = tl.load(s_row + start + lane, mask=is_real, other=0.0).to(tl.float32) - s_max
        t = tl.load(t_row + start + lane, mask=is_real, other=0.0).to(tl.float32) - t_max
        weight = tl.where(is_real, tl.exp2(t * scale), 0.0)
        s_sum += tl.where(is_real, tl.exp2(s * scale), 0.0)
        t_sum += weight
        dot += tl.where(is_real, weight * ((t - s) * scale), 0.0)
    tl.store(stats + row, s_max)
    tl.store(stats + rows + row, t_max)
    tl.store(stats + 2 * rows + row, tl.sum(s_sum, 0))
    tl.store(stats + 3 * rows + row, tl.sum(t_sum, 0))
    tl.store(stats + 4 * rows + row, tl.sum(dot, 0))


@triton.jit
def _gradient_kernel(
    student,
    teacher,
    known,
    factor,
    gradient,
    rows,
    s_width,
    t_width,
    columns,
    scale,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_row, t_row, g_row = student + row * s_width, teacher + row * t_width, gradient + row * s_width
    s_max, t_max = tl.load(known + row), tl.load(known + rows + row)
    s_sum, t_sum = tl.load(known + 2 * rows + row), tl.load(known + 3 * rows + row)
    ratio, row_factor = s_sum / t_sum, tl.load(factor + row) / s_sum
    lane = tl.arange(0, block)
    for start in range(0, s_width, block):
        is_real = start + lane < columns
        s = tl.load(s_row + start + lane, mask=is_real, other=0.0).to(tl.float32)
        t = tl.load(t_row + start + lane, mask=is_real, other=0.0).to(tl.float32)
        gap = tl.exp2((s - s_max) * scale) - tl.exp2((t - t_max) * scale) * ratio
        result = tl.where(is_real, gap * row_factor, 0.0).to(gradient.dtype.element_ty)
        tl.store(g_row + start + lane, result, mask=start + lane < s_width)


def kl_stats(student: Tensor, teacher: Tensor, temperature: float, columns: int) -> Tensor:
    """Return [5, S, B] float32, see ``native.kl_stats``."""
    stats = torch.empty(5, *student.shape[:-1], device=student.device)
    rows = stats[0].numel()
    widths = (student.size(-1), teacher.size(-1), columns, LOG2_E / temperature)
    _stats_kernel[(rows,)](student, teacher, stats, rows, *widths, block=BLOCK, num_warps=8)
    return stats


def kl_gradient(
    student: Tensor, teacher: Tensor, rows: Tensor, scale: Tensor, temperature: float, columns: int
) -> Tensor:
    """Return the gradient of the student's logits, see ``native.kl_gradient``."""
    gradient = torch.empty_like(student)
    count = scale.numel()
    _gradient_kernel[(count,)](
        student,
        teacher,
        rows.contiguous(),
        scale.contiguous(),
        gradient,
        count,
        student.size(-1),
        teacher.size(-1),
        columns,
        LOG2_E / temperature,
        block=BLOCK,
        num_warps=8,
    )
    return gradient
