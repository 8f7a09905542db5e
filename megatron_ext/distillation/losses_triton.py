"""Statistics and gradients of rows of logits as Triton kernels, a program for each row.

Functions as in ``native``; formulas stand at the public functions of ``losses``. A unit is the
memory of one model's logits. ``row_stats`` reads both once, 2 units: sums are centred on the
largest logit that a lane has seen so far, and scaled down where a larger one comes. ``gradient``
reads both again and writes, 3 units. ``mixture_sums``, which only jsd needs, reads both, 2 units.
Logits are subtracted from one another before they are scaled, and products arranged so that two
equal models give zero although the compiler fuses. The logits may differ in dtype and width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.distillation.chunks import LOG2_E
from megatron_ext.distillation.native import MOMENTS

# Lanes of the statistics, which take two columns at a time, and columns of the others.
BLOCKS = {"none": 1024, "gap": 1024, "products": 512}
BLOCK = 4096
MIXTURE_BLOCK = 2048
# Below any logit, and finite: shifts from it must not be infinite.
FLOOR = tl.constexpr(-1e30)
NAT = tl.constexpr(1 / LOG2_E)  # of a bit
LOSSES = ("forward-kl", "reverse-kl", "mse", "cosine", "jsd")
KINDS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _stats_kernel(
    student,
    teacher,
    stats,
    rows,
    s_width,
    t_width,
    columns,
    scale,
    moments: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_row, t_row = student + row * s_width, teacher + row * t_width
    lane = tl.arange(0, block)
    # Every lane has maxima and sums of its own: no thread waits for another before the end.
    s_sum = tl.zeros([block], tl.float32)
    t_sum, first, second, third = s_sum, s_sum, s_sum, s_sum
    s_max = s_sum + FLOOR
    t_max = s_max
    for start in range(0, columns, 2 * block):
        here, there = start + lane < columns, start + block + lane < columns
        s, t = _load(s_row + start + lane, here), _load(t_row + start + lane, here)
        u, v = (
            _load(s_row + start + block + lane, there),
            _load(t_row + start + block + lane, there),
        )
        s_higher = tl.maximum(s_max, tl.maximum(s, u))
        t_higher = tl.maximum(t_max, tl.maximum(t, v))
        # What was summed so far was centred on lower maxima.
        s_shift, t_shift = (s_higher - s_max) * scale, (t_higher - t_max) * scale
        s_max, t_max = s_higher, t_higher
        s_factor, t_factor = tl.exp2(-s_shift), tl.exp2(-t_shift)
        p_s, p_t = tl.exp2((s - s_max) * scale), tl.exp2((t - t_max) * scale)
        p_u, p_v = tl.exp2((u - s_max) * scale), tl.exp2((v - t_max) * scale)
        if moments == "gap":
            first = (first + (s_shift - t_shift) * t_sum) * t_factor
            first += tl.where(
                here & (t != float("-inf")), p_t * (((t - t_max) - (s - s_max)) * scale), 0.0
            )
            first += tl.where(
                there & (v != float("-inf")), p_v * (((v - t_max) - (u - s_max)) * scale), 0.0
            )
        if moments == "products":
            first = first * (s_factor * s_factor) + p_s * p_s + p_u * p_u
            second = second * (t_factor * t_factor) + p_t * p_t + p_v * p_v
            third = third * (s_factor * t_factor) + p_s * p_t + p_u * p_v
        s_sum = s_sum * s_factor + p_s + p_u
        t_sum = t_sum * t_factor + p_t + p_v
    s_top, t_top = tl.max(s_max, 0), tl.max(t_max, 0)
    s_shift, t_shift = (s_top - s_max) * scale, (t_top - t_max) * scale
    s_factor, t_factor = tl.exp2(-s_shift), tl.exp2(-t_shift)
    if moments == "gap":
        first = (first + (s_shift - t_shift) * t_sum) * t_factor
    if moments == "products":
        first = first * (s_factor * s_factor)
        second = second * (t_factor * t_factor)
        third = third * (s_factor * t_factor)
    tl.store(stats + row, s_top)
    tl.store(stats + rows + row, t_top)
    tl.store(stats + 2 * rows + row, tl.sum(s_sum * s_factor, 0))
    tl.store(stats + 3 * rows + row, tl.sum(t_sum * t_factor, 0))
    if moments != "none":
        tl.store(stats + 4 * rows + row, tl.sum(first, 0))
    if moments == "products":
        tl.store(stats + 5 * rows + row, tl.sum(second, 0))
        tl.store(stats + 6 * rows + row, tl.sum(third, 0))


@triton.jit
def _load(logits, is_real):
    """Return logits, -inf where there are none."""
    return tl.load(logits, mask=is_real, other=float("-inf")).to(tl.float32)


@triton.jit
def _log2(x, is_fast: tl.constexpr):
    """Return log2 x, within 2^-22 if it is fast: one instruction in place of twenty-five."""
    if is_fast:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@triton.jit
def _likelier_over_mixture(d, beta, is_fast: tl.constexpr):
    """Return log2 of max(p_s, p_t) / m, and min / max, of d = log2 p_t - log2 p_s.

    From the likelier of the two: the other may be 0, and equal ones give zero.
    """
    other = tl.exp2(-tl.abs(d))
    weight = tl.where(d > 0, beta, 1 - beta)
    return -_log2(weight + (1 - weight) * other, is_fast), other


@triton.jit
def _mixture_terms(s, t, s_log, t_log, scale, beta, is_fast: tl.constexpr):
    """Return p_s (log2 p_s - log2 m) and p_t (log2 p_t - log2 m) of centred logits."""
    s_bits, t_bits = s * scale - s_log, t * scale - t_log
    d = (t - s) * scale + (s_log - t_log)
    above, other = _likelier_over_mixture(d, beta, is_fast)
    likelier = tl.exp2(tl.where(d > 0, t_bits, s_bits))
    more, less = likelier * above, likelier * other * (above - tl.abs(d))
    s_term, t_term = tl.where(d > 0, less, more), tl.where(d > 0, more, less)
    none = float("-inf")  # p log p is 0 where p is, whatever its logarithm
    return tl.where(s == none, 0.0, s_term), tl.where(t == none, 0.0, t_term)


@triton.jit
def _mixture_kernel(
    student,
    teacher,
    known,
    sums,
    rows,
    s_width,
    t_width,
    columns,
    scale,
    beta,
    is_fast: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_row, t_row = student + row * s_width, teacher + row * t_width
    s_max, t_max = tl.load(known + row), tl.load(known + rows + row)
    s_log = tl.log2(tl.load(known + 2 * rows + row))
    t_log = tl.log2(tl.load(known + 3 * rows + row))
    lane = tl.arange(0, block)
    s_total = tl.zeros([block], tl.float32)
    t_total = tl.zeros([block], tl.float32)
    whole = columns // block * block
    for start in range(0, whole, block):
        s = tl.load(s_row + start + lane).to(tl.float32) - s_max
        t = tl.load(t_row + start + lane).to(tl.float32) - t_max
        s_term, t_term = _mixture_terms(s, t, s_log, t_log, scale, beta, is_fast)
        s_total += s_term
        t_total += t_term
    is_real = whole + lane < columns
    s = tl.load(s_row + whole + lane, mask=is_real, other=0.0).to(tl.float32) - s_max
    t = tl.load(t_row + whole + lane, mask=is_real, other=0.0).to(tl.float32) - t_max
    s_term, t_term = _mixture_terms(s, t, s_log, t_log, scale, beta, is_fast)
    s_total += tl.where(is_real, s_term, 0.0)
    t_total += tl.where(is_real, t_term, 0.0)
    tl.store(sums + row, tl.sum(s_total, 0) * NAT)
    tl.store(sums + rows + row, tl.sum(t_total, 0) * NAT)


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
    beta,
    is_fast: tl.constexpr,
    loss: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_row, t_row, g_row = student + row * s_width, teacher + row * t_width, gradient + row * s_width
    s_max, t_max = tl.load(known + row), tl.load(known + rows + row)
    s_sum, t_sum = tl.load(known + 2 * rows + row), tl.load(known + 3 * rows + row)
    ratio, row_factor = s_sum / t_sum, tl.load(factor + row) / s_sum
    if loss != "forward-kl":
        fourth = tl.load(known + 4 * rows + row)
    if loss == "cosine":
        norms = tl.load(known + 5 * rows + row)
    if loss == "jsd":
        shift = tl.log2(s_sum) - tl.log2(t_sum)
    lane = tl.arange(0, block)
    for start in range(0, s_width, block):
        is_real = start + lane < columns
        s = tl.load(s_row + start + lane, mask=is_real, other=0.0).to(tl.float32)
        t = tl.load(t_row + start + lane, mask=is_real, other=0.0).to(tl.float32)
        s, t = s - s_max, t - t_max
        # Both times the student's sum of exponentials, which row_factor takes out of the slope.
        p_s, p_t = tl.exp2(s * scale), tl.exp2(t * scale) * ratio
        if loss == "forward-kl":
            slope = p_s - p_t
        elif loss == "reverse-kl":
            slope = p_s * (((s - t) * scale - fourth) * NAT)
        elif loss == "mse":
            slope = p_s * (2 * ((p_s - p_t) / s_sum - fourth))
        elif loss == "cosine":
            slope = p_s * ((p_s * fourth - p_t / norms) / s_sum)
        else:
            tl.static_assert(loss == "jsd")
            d = (t - s) * scale + shift
            above, _ = _likelier_over_mixture(d, beta, is_fast)
            slope = p_s * ((1 - beta) * ((above - tl.maximum(d, 0.0)) * NAT - fourth))
        result = tl.where(is_real, slope * row_factor, 0.0).to(gradient.dtype.element_ty)
        tl.store(g_row + start + lane, result, mask=start + lane < s_width)


def takes(student: Tensor, teacher: Tensor) -> bool:
    """Whether there are kernels for these dtypes."""
    return student.dtype in KINDS and teacher.dtype in KINDS


def row_stats(
    student: Tensor, teacher: Tensor, temperature: float, columns: int, moments: str
) -> Tensor:
    """Return [4 + m, S, B] float32, see ``native``."""
    shape = (4 + MOMENTS[moments], *student.shape[:-1])
    stats = torch.empty(shape, dtype=torch.float32, device=student.device)
    choice = {"moments": moments, "block": BLOCKS[moments], "num_warps": 4}
    _launch(_stats_kernel, student, teacher, columns, temperature, (stats,), **choice)
    return stats


def mixture_sums(
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    temperature: float,
    columns: int,
    beta: float,
) -> Tensor:
    """Return [2, S, B] float32, see ``native``."""
    sums = torch.empty_like(stats[:2])
    outs = (stats.contiguous(), sums)
    choice = {"is_fast": _is_fast(student), "block": MIXTURE_BLOCK}
    _launch(_mixture_kernel, student, teacher, columns, temperature, outs, (beta,), **choice)
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
    """Return the gradient of the student's logits, see ``native``."""
    result = torch.empty_like(student)
    outs = (stats.contiguous(), scale.contiguous(), result)
    choice = {"is_fast": _is_fast(student), "loss": loss, "block": BLOCK}
    _launch(_gradient_kernel, student, teacher, columns, temperature, outs, (beta,), **choice)
    return result


def _is_fast(student: Tensor) -> bool:
    """Whether 2^-22 of log2 is below what the logits can tell; the interpreter has no assembler."""
    return student.dtype != torch.float32 and not triton.knobs.runtime.interpret


def _launch(
    kernel, student, teacher, columns, temperature, tensors, numbers=(), *, num_warps=8, **choice
) -> None:
    """Run ``kernel`` on every row: what all three take, in their order."""
    rows = student[..., 0].numel()
    if rows:
        sizes = (rows, student.size(-1), teacher.size(-1), columns, LOG2_E / temperature)
        kernel[(rows,)](student, teacher, *tensors, *sizes, *numbers, **choice, num_warps=num_warps)
