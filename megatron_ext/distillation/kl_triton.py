"""The statistics and the gradient of KL as Triton kernels, a program for each row.

A unit is the memory of one model's logits. Forward reads both once, 2 units: sums are centred on
the largest logit so far, and scaled down where a larger one comes. Backward reads both again and
writes the gradient, 3 units. Products are arranged so that two equal models give zero. Functions as
in ``native``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.distillation.chunks import LOG2_E

BLOCK = 4096
# Below any logit, and finite: shifts from it must not be infinite.
FLOOR = tl.constexpr(-1e30)


@triton.jit
def _stats_kernel(
    student, teacher, stats, rows, s_width, t_width, columns, scale, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    s_row, t_row = student + row * s_width, teacher + row * t_width
    lane = tl.arange(0, block)
    s_max, t_max = FLOOR, FLOOR
    s_sum = tl.zeros([block], tl.float32)
    t_sum = tl.zeros([block], tl.float32)
    dot = tl.zeros([block], tl.float32)
    for start in range(0, columns, block):
        is_real = start + lane < columns
        s = tl.load(s_row + start + lane, mask=is_real, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + start + lane, mask=is_real, other=float("-inf")).to(tl.float32)
        s_higher, t_higher = tl.maximum(s_max, tl.max(s, 0)), tl.maximum(t_max, tl.max(t, 0))
        # What was summed so far was centred on lower maxima.
        s_shift, t_shift = (s_higher - s_max) * scale, (t_higher - t_max) * scale
        s_max, t_max = s_higher, t_higher
        t_factor = tl.exp2(-t_shift)
        dot = (dot + (s_shift - t_shift) * t_sum) * t_factor
        weight = tl.exp2((t - t_max) * scale)
        s_sum = s_sum * tl.exp2(-s_shift) + tl.exp2((s - s_max) * scale)
        t_sum = t_sum * t_factor + weight
        gap = (t - t_max) - (s - s_max)
        dot += tl.where(is_real, weight * (gap * scale), 0.0)
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
