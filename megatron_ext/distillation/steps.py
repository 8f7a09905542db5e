"""What each logit loss computes: statistics of rows with a gather, and a closed-form gradient.

``per_token_loss`` has the one autograd function around them; a new loss is a new ``Steps``. Shape
letters are those of ``chunks``; formulas stand at the public functions of ``losses``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_ext.distillation import native
from megatron_ext.distillation.chunks import (
    LOG2_E,
    center_,
    chunks,
    compute_dtype,
    gather_ranks,
    normalisers,
    real_columns,
)


class Steps(NamedTuple):
    """What distinguishes one loss from another."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    """(student, teacher, temperature, real columns, group) -> loss per token [S, B] float64, and
    what ``gradient`` needs as rows [k, S, B], first both models' maxima, sums of exponentials."""
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Bits s, t [n, B, c] and rows [k, n, B, 1] of a chunk -> T times d loss / d student logits.
    May overwrite s and t."""
    fast_gradient: Callable[..., Tensor | None] | None = None
    """As ``native.kl_gradient``: the whole gradient at once, or None where it declines."""


def per_token_loss(
    steps: Steps,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    vocab_size: int | None,
    tp_group: ProcessGroup | None,
) -> Tensor:
    """Return the loss of ``steps`` per token, [S, B]; arguments as in ``losses``."""
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")
    columns = real_columns(student, teacher, vocab_size, tp_group)
    return _RowLoss.apply(student, teacher.detach(), steps, temperature, columns, tp_group)


class _RowLoss(torch.autograd.Function):
    """Written by hand because autograd would keep float32 copies of the logits.

    It would also differentiate through the gather, which multiplies the gradient by R.
    """

    @staticmethod
    def forward(ctx, student, teacher, steps, temperature, columns, tp_group):
        loss, rows = steps.forward(student, teacher, temperature, columns, tp_group)
        dtype = compute_dtype(student, teacher)
        ctx.save_for_backward(student, teacher, rows.to(dtype))
        ctx.steps, ctx.temperature, ctx.columns = steps, temperature, columns
        return loss.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        student, teacher, rows = ctx.saved_tensors
        # No all-reduce: the loss is replicated over tp_group, and therefore grad_loss is too.
        scale = grad_loss / ctx.temperature
        if ctx.steps.fast_gradient is not None:
            settings = (ctx.temperature, ctx.columns)
            fast = ctx.steps.fast_gradient(student, teacher, rows, scale, *settings)
            if fast is not None:
                return fast, None, None, None, None, None
        scale = scale.unsqueeze(-1)
        grad = torch.empty_like(student)
        grad[..., ctx.columns :].zero_()
        for place, s, t in chunks(student, teacher, ctx.columns):
            center_(s, rows[0, place], ctx.temperature)
            center_(t, rows[1, place], ctx.temperature)
            part = ctx.steps.gradient(s, t, rows[:, place].unsqueeze(-1))
            grad[place, :, : ctx.columns] = part.mul_(scale[place])
        return grad, None, None, None, None, None


# Forward and reverse KL share their statistics, with the models' roles exchanged.


def _forward_kl(student, teacher, temperature, columns, tp_group):
    stats = _kl_stats(student, teacher, temperature, columns)  # [5, S, B]
    kl, row_max, row_sum = _combine_kl(gather_ranks(stats, tp_group).double(), temperature)
    return kl, torch.cat([row_max, row_sum])


def _forward_kl_gradient(s, t, rows):
    # Maxima and sums, not log-sum-exps: their rounding would shift a whole row of p_s - p_t.
    return s.exp2_().div_(rows[2]).sub_(t.exp2_().div_(rows[3]))


def _reverse_kl(student, teacher, temperature, columns, tp_group):
    stats = _kl_stats(teacher, student, temperature, columns)
    kl, row_max, row_sum = _combine_kl(gather_ranks(stats, tp_group).double(), temperature)
    offset = row_sum[1].log2() - row_sum[0].log2() + kl * LOG2_E
    return kl, torch.cat([row_max.flip(0), row_sum.flip(0), offset.unsqueeze(0)])


def _reverse_kl_gradient(s, t, rows):
    gap = t.neg_().add_(s).sub_(rows[4]).div_(LOG2_E)
    return s.exp2_().div_(rows[2]).mul_(gap)


FORWARD_KL = Steps(_forward_kl, _forward_kl_gradient, native.kl_gradient)
REVERSE_KL = Steps(_reverse_kl, _reverse_kl_gradient)


def _kl_stats(student: Tensor, teacher: Tensor, temperature: float, columns: int) -> Tensor:
    """Return this rank's [5, S, B]: max s, max t, sum 2^s', sum 2^t', sum 2^t' (t' - s').

    s' and t' are centred on the rank's maxima: a product with the raw logits would lose to
    rounding what the difference of two similar models is made of.
    """
    fast = native.kl_stats(student, teacher, temperature, columns)
    if fast is not None:
        return fast
    stats = student.new_zeros(5, *student.shape[:-1], dtype=compute_dtype(student, teacher))
    # For a rank that holds only padding: loses every max, and stays finite in the arithmetic.
    stats[:2] = torch.finfo(torch.float32).min
    for rows, s, t in chunks(student, teacher, columns):
        torch.amax(s, -1, out=stats[0, rows])
        torch.amax(t, -1, out=stats[1, rows])
        center_(s, stats[0, rows], temperature)
        center_(t, stats[1, rows], temperature)
        gap = t - s
        torch.sum(s.exp2_(), -1, out=stats[2, rows])
        torch.sum(t.exp2_(), -1, out=stats[3, rows])
        torch.sum(gap.mul_(t), -1, out=stats[4, rows])
    return stats


def _combine_kl(stats: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL [S, B] and the rows' maxima and sums of exponentials, [2, S, B] each.

    Args:
        stats: [R, 5, S, B] float64. In float32 the logarithms would cost half of KL's digits.
        temperature: T.
    """
    rank_max, rank_sum, dot = stats[:, :2], stats[:, 2:4], stats[:, 4]
    row_max = rank_max.amax(0)  # [2, S, B]
    offset = (rank_max - row_max) * (LOG2_E / temperature)  # [R, 2, S, B], bits
    weight = offset.exp2()
    row_sum = (weight * rank_sum).sum(0)  # [2, S, B]
    shift = offset[:, 1] - offset[:, 0]  # [R, S, B]
    gap = (weight[:, 1] * (dot + shift * rank_sum[:, 1])).sum(0) / row_sum[1]
    bits = gap + row_sum[0].log2() - row_sum[1].log2()
    return bits.clamp(min=0) / LOG2_E, row_max, row_sum  # only rounding makes a KL negative


# Squared distance and cosine: products of exponentials, rescaled once the ranks' maxima are known.


def _products(student, teacher, temperature, columns, tp_group):
    """Return p_s . p_s, p_t . p_t, p_s . p_t as [3, S, B] float64, and [4, S, B] as of ``Steps``.

    One all-gather of 7 floats per token.
    """
    stats = student.new_zeros(7, *student.shape[:-1], dtype=compute_dtype(student, teacher))
    stats[:2] = torch.finfo(torch.float32).min
    for rows, s, t in chunks(student, teacher, columns):
        torch.amax(s, -1, out=stats[0, rows])
        torch.amax(t, -1, out=stats[1, rows])
        center_(s, stats[0, rows], temperature).exp2_()
        center_(t, stats[1, rows], temperature).exp2_()
        for number, (x, y) in enumerate(((s, s), (t, t), (s, t)), 4):
            torch.sum(x * y, -1, out=stats[number, rows])
        torch.sum(s, -1, out=stats[2, rows])
        torch.sum(t, -1, out=stats[3, rows])
    stats = gather_ranks(stats, tp_group).double()  # [R, 7, S, B]
    row_max = stats[:, :2].amax(0)
    weight = ((stats[:, :2] - row_max) * (LOG2_E / temperature)).exp2()  # [R, 2, S, B]
    row_sum = (weight * stats[:, 2:4]).sum(0)
    pairs = torch.tensor([[0, 1, 0], [0, 1, 1]], device=student.device)
    products = (weight[:, pairs[0]] * weight[:, pairs[1]] * stats[:, 4:]).sum(0)
    return products / (row_sum[pairs[0]] * row_sum[pairs[1]]), torch.cat([row_max, row_sum])


def _mse(*inputs):
    (ss, tt, st), rows = _products(*inputs)
    return (ss + tt - 2 * st).clamp(min=0), torch.cat([rows, (ss - st).unsqueeze(0)])


def _mse_gradient(s, t, rows):
    s.exp2_().div_(rows[2])
    gap = t.exp2_().div_(rows[3]).neg_().add_(s).sub_(rows[4])
    return s.mul_(gap).mul_(2)


def _cosine(*inputs):
    (ss, tt, st), rows = _products(*inputs)
    norms = (ss * tt).sqrt()
    return (1 - st / norms).clamp(min=0), torch.cat([rows, torch.stack([st / ss / norms, norms])])


def _cosine_gradient(s, t, rows):
    s.exp2_().div_(rows[2])
    gap = t.exp2_().div_(rows[3]).div_(rows[5])
    return s.mul_((s * rows[4]).sub_(gap))


MSE, COSINE = Steps(_mse, _mse_gradient), Steps(_cosine, _cosine_gradient)


# Jensen-Shannon: the logarithm of the mixture needs both distributions normalised first.


def jsd(beta: float) -> Steps:
    """Return the steps of the Jensen-Shannon divergence with weight ``beta`` on the teacher."""

    def forward(student, teacher, temperature, columns, tp_group):
        row_max, row_sum = normalisers(student, teacher, temperature, columns, tp_group)
        dtype = compute_dtype(student, teacher)
        rows = torch.cat([row_max, row_sum]).to(dtype)
        sums = student.new_zeros(2, *student.shape[:-1], dtype=dtype)
        for place, s, t in chunks(student, teacher, columns):
            center_(s, rows[0, place], temperature)
            center_(t, rows[1, place], temperature)
            p_s, p_t, from_m, t_from_m = against_mixture(s, t, rows[:, place].unsqueeze(-1))
            torch.sum(p_s.mul_(from_m), -1, out=sums[0, place])
            torch.sum(p_t.mul_(t_from_m), -1, out=sums[1, place])
        student_kl, teacher_kl = gather_ranks(sums, tp_group).double().sum(0)
        jsd = (beta * teacher_kl + (1 - beta) * student_kl).clamp(min=0)
        return jsd, torch.cat([row_max, row_sum, student_kl.unsqueeze(0)])

    def against_mixture(s, t, rows):
        """Return p_s, p_t, log p_s - log m and log p_t - log m, in nats."""
        s.sub_(rows[2].log2())
        t.sub_(rows[3].log2())
        p_s, p_t = s.exp2(), t.exp2()
        log_m = torch.logaddexp2(s + math.log2(1 - beta), t + math.log2(beta))
        return p_s, p_t, s.sub_(log_m).div_(LOG2_E), t.sub_(log_m).div_(LOG2_E)

    def gradient(s, t, rows):
        p_s, _, from_m, _ = against_mixture(s, t, rows)
        return p_s.mul_(from_m.sub_(rows[4])).mul_(1 - beta)

    return Steps(forward, gradient)
