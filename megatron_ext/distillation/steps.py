"""The steps of each logit loss: statistics of rows with a gather, and a closed-form gradient.

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
    not_below_zero,
    real_columns,
    weighted_,
)
from megatron_ext.distillation.row_stats import gathered_stats


class Steps(NamedTuple):
    """The steps in which one loss differs from another."""

    loss: str
    """Its name in ``LOSSES`` of losses_c and losses_triton; torch computes what they lack."""
    forward: Callable[..., tuple[Tensor, Tensor]]
    """(student, teacher, temperature, real columns, group) -> loss per token [S, B] float64, and
    what ``gradient`` needs as statistics [k, S, B]: the student's and the teacher's maximum, their
    sums of exponentials, and what the loss adds."""
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Bits s, t [n, B, c] of a chunk and its statistics [k, n, B, 1] -> T times d loss / d student
    logits. May overwrite s and t."""
    beta: float = 0.0
    """Weight of the teacher in jsd's mixture."""


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
        loss, stats = steps.forward(student, teacher, temperature, columns, tp_group)
        dtype = compute_dtype(student, teacher)
        ctx.save_for_backward(student, teacher, stats.to(dtype))
        ctx.steps, ctx.temperature, ctx.columns = steps, temperature, columns
        return loss.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        student, teacher, stats = ctx.saved_tensors
        # No all-reduce: the loss is replicated over tp_group, and therefore grad_loss is too.
        scale = grad_loss / ctx.temperature
        loss = ctx.steps.loss
        kernels = native.kernels(student, teacher, ctx.columns, gradient_of=loss)
        if kernels is not None:
            settings = (ctx.temperature, ctx.columns, ctx.steps.beta)
            grad = kernels.gradient(loss, student, teacher, stats, scale, *settings)
            return grad, None, None, None, None, None
        scale = scale.unsqueeze(-1)
        grad = torch.empty_like(student)
        grad[..., ctx.columns :].zero_()
        for positions, s, t in chunks(student, teacher, ctx.columns):
            center_(s, stats[0, positions], ctx.temperature)
            center_(t, stats[1, positions], ctx.temperature)
            part = ctx.steps.gradient(s, t, stats[:, positions].unsqueeze(-1))  # [n, B, c]
            grad[positions, :, : ctx.columns] = part.mul_(scale[positions])
        return grad, None, None, None, None, None


# Forward and reverse KL share their statistics, with the models' roles exchanged.


def _kl(student, teacher, temperature, columns, tp_group):
    """Return KL(teacher || student) [S, B] and the statistics [4, S, B]."""
    stats, offset, of_ranks = gathered_stats(
        student, teacher, temperature, columns, tp_group, "gap"
    )
    _, _, s_sum, t_sum = stats  # [S, B] each
    shift = offset[:, 1] - offset[:, 0]  # [R, S, B]
    # A rank's sum of exp2(t') (t' - s'), moved from the rank's maxima to those of all ranks.
    dot = of_ranks[:, 4] + shift * of_ranks[:, 3]
    gap = (offset[:, 1].exp2() * dot).sum(0) / t_sum
    bits = gap + s_sum.log2() - t_sum.log2()
    return not_below_zero(bits) / LOG2_E, stats


def _forward_kl_gradient(s, t, stats):
    # Maxima and sums, not log-sum-exps: their rounding would shift a whole row of p_s - p_t.
    _, _, s_sum, t_sum = stats
    return s.exp2_().div_(s_sum).sub_(t.exp2_().div_(t_sum))


def _reverse_kl(student, teacher, temperature, columns, tp_group):
    kl, (t_max, s_max, t_sum, s_sum) = _kl(teacher, student, temperature, columns, tp_group)
    mean_gap = s_sum.log2() - t_sum.log2() + kl * LOG2_E  # sum of p_s (s' - t'), in bits
    return kl, torch.stack([s_max, t_max, s_sum, t_sum, mean_gap])


def _reverse_kl_gradient(s, t, stats):
    _, _, s_sum, _, mean_gap = stats
    gap = t.neg_().add_(s).sub_(mean_gap).div_(LOG2_E)
    return s.exp2_().div_(s_sum).mul_(gap)


FORWARD_KL = Steps("forward-kl", _kl, _forward_kl_gradient)
REVERSE_KL = Steps("reverse-kl", _reverse_kl, _reverse_kl_gradient)


# Squared distance and cosine: products of exponentials, rescaled once the ranks' maxima are known.


def _products(*inputs):
    """Return p_s . p_s, p_t . p_t, p_s . p_t as [3, S, B] float64, and the statistics [4, S, B]."""
    stats, offset, of_ranks = gathered_stats(*inputs, "products")
    (s, t), (s_sum, t_sum) = offset.unbind(1), stats[2:]  # [R, S, B]; [S, B]
    weight = torch.stack([s + s, t + t, s + t], dim=1).exp2()  # [R, 3, S, B]
    products = (weight * of_ranks[:, 4:]).sum(0)
    return products / torch.stack([s_sum * s_sum, t_sum * t_sum, s_sum * t_sum]), stats


def _mse(*inputs):
    (ss, tt, st), stats = _products(*inputs)
    return not_below_zero(ss + tt - 2 * st), torch.cat([stats, (ss - st).unsqueeze(0)])


def _mse_gradient(s, t, stats):
    _, _, s_sum, t_sum, mean_gap = stats  # the last: p_s . (p_s - p_t)
    s.exp2_().div_(s_sum)
    gap = t.exp2_().div_(t_sum).neg_().add_(s).sub_(mean_gap)
    return s.mul_(gap).mul_(2)


def _cosine(*inputs):
    (ss, tt, st), stats = _products(*inputs)
    norms = (ss * tt).sqrt()
    known = torch.cat([stats, torch.stack([st / ss / norms, norms])])
    return not_below_zero(1 - st / norms), known


def _cosine_gradient(s, t, stats):
    _, _, s_sum, t_sum, pull, norms = stats  # pull: cos / (p_s . p_s)
    s.exp2_().div_(s_sum)
    gap = t.exp2_().div_(t_sum).div_(norms)
    return s.mul_((s * pull).sub_(gap))


MSE, COSINE = Steps("mse", _mse, _mse_gradient), Steps("cosine", _cosine, _cosine_gradient)


# Jensen-Shannon: the logarithm of the mixture needs both distributions normalised first.


def jsd(beta: float) -> Steps:
    """Return the steps of the Jensen-Shannon divergence with weight ``beta`` on the teacher."""

    def forward(student, teacher, temperature, columns, tp_group):
        stats, _, _ = gathered_stats(student, teacher, temperature, columns, tp_group)
        known = stats.to(compute_dtype(student, teacher))
        kernels = native.kernels(student, teacher, columns)
        if kernels is not None:
            sums = kernels.mixture_sums(student, teacher, known, temperature, columns, beta)
        else:
            sums = mixture_sums(student, teacher, known, temperature, columns)
        student_kl, teacher_kl = gather_ranks(sums, tp_group).double().sum(0)
        jsd = not_below_zero(beta * teacher_kl + (1 - beta) * student_kl)
        return jsd, torch.cat([stats, student_kl.unsqueeze(0)])

    def mixture_sums(student, teacher, stats, temperature, columns):
        """Return the sums of p_s (log p_s - log m) and p_t (log p_t - log m), [2, S, B]."""
        sums = torch.zeros_like(stats[:2])
        for positions, s, t in chunks(student, teacher, columns):
            center_(s, stats[0, positions], temperature)
            center_(t, stats[1, positions], temperature)
            known = stats[2:, positions].unsqueeze(-1)  # [2, n, B, 1]
            p_s, p_t, from_m, t_from_m = against_mixture(s, t, *known)
            torch.sum(weighted_(p_s, from_m), -1, out=sums[0, positions])
            torch.sum(weighted_(p_t, t_from_m), -1, out=sums[1, positions])
        return sums

    def against_mixture(s, t, s_sum, t_sum):
        """Return p_s, p_t, log p_s - log m and log p_t - log m, in nats."""
        s.sub_(s_sum.log2())
        t.sub_(t_sum.log2())
        p_s, p_t = s.exp2(), t.exp2()
        log_m = torch.logaddexp2(s + math.log2(1 - beta), t + math.log2(beta))
        return p_s, p_t, s.sub_(log_m).div_(LOG2_E), t.sub_(log_m).div_(LOG2_E)

    def gradient(s, t, stats):
        _, _, s_sum, t_sum, student_kl = stats
        p_s, _, from_m, _ = against_mixture(s, t, s_sum, t_sum)
        return p_s.mul_(from_m.sub_(student_kl)).mul_(1 - beta)

    return Steps("jsd", forward, gradient, beta)
