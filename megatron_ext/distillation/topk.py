"""Forward KL over the teacher's likeliest tokens, from its logits or from what was stored of them.

Shape letters are those of ``chunks``, and K tokens are kept. The rest of the vocabulary is

    drop   left out: both distributions are renormalised over the K tokens
    tail   one bucket more, with the mass that either model gives to all other tokens
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_ext.distillation.chunks import (
    center_,
    chunks,
    compute_dtype,
    gather_ranks,
    not_below_zero,
    real_columns,
)
from megatron_ext.distillation.row_stats import gathered_stats

DROP, TAIL = RESTS = ("drop", "tail")


class TopK(NamedTuple):
    """The teacher's likeliest tokens, equal on all tensor-parallel ranks."""

    tokens: Tensor
    """[S, B, K] int64, different ones; of the whole vocabulary."""
    log_probs: Tensor
    """[S, B, K] float32 or float64, in nats, normalised over the whole vocabulary."""


def teacher_top_k(
    logits: Tensor,
    top_k: int,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: ProcessGroup | None = None,
) -> TopK:
    """Return the ``top_k`` likeliest tokens of each position, the likeliest first.

    Of equal logits the lower token comes first, so that the choice does not depend on R. (Logits
    are compared in float32.) One all-gather of K numbers of 8 bytes and one of 4 floats per token.

    Args:
        logits: [S, B, v], any float dtype; no gradient.
        top_k: K, at most the vocabulary.
        temperature: T > 0.
        vocab_size: the vocabulary before padding; None if no column is padding.
        tp_group: the ranks that together hold the vocabulary; None if this rank holds all of it.

    Raises:
        ValueError: K is less than 1 or more than the vocabulary.
    """
    logits = logits.detach()
    columns = real_columns(logits, logits, vocab_size, tp_group)
    rank = tp_group.rank() if tp_group is not None else 0
    whole = _whole(logits, vocab_size, tp_group)
    if not 1 <= top_k <= whole:
        raise ValueError(f"top_k must be within 1 and the vocabulary, {whole}: {top_k}.")
    keys = logits.new_full((*logits.shape[:-1], top_k), -(2**63), dtype=torch.int64)
    first = rank * logits.size(-1)
    for positions, x, _ in chunks(logits, logits, columns):
        best = _sortable(x, first).topk(min(top_k, columns), dim=-1).values
        keys[positions, :, : best.size(-1)] = best
    keys = gather_ranks(keys, tp_group).movedim(0, -2).flatten(-2)  # [S, B, R * K]
    keys = keys.topk(top_k, dim=-1).values
    tokens, chosen = _from_sortable(keys)
    (row_max, _, row_sum, _), _, _ = gathered_stats(logits, logits, temperature, columns, tp_group)
    log_sum = (row_max / temperature + row_sum.log()).unsqueeze(-1)
    log_probs = chosen.double() / temperature - log_sum
    return TopK(tokens, log_probs.to(compute_dtype(logits, logits)))


def _whole(logits: Tensor, vocab_size: int | None, tp_group: ProcessGroup | None) -> int:
    """Return the number of tokens of the vocabulary."""
    return vocab_size or logits.size(-1) * (1 if tp_group is None else tp_group.size())


def _sortable(x: Tensor, first: int) -> Tensor:
    """Return int64 that sort as (logit ascending, token descending), of [n, B, c]."""
    bits = (x.to(torch.float32) + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: -0 equals 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    tokens = torch.arange(first, first + x.size(-1), device=x.device)
    return (ordered << 32) | (0xFFFFFFFF - tokens)


def _from_sortable(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens and logits, the inverse of ``_sortable``."""
    ordered = keys >> 32
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(torch.int32)
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF), bits.view(torch.float32)


def vocab_parallel_top_k_kl(
    student_logits: Tensor,
    teacher: TopK,
    *,
    rest: str = DROP,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Per-token KL(teacher || student) over the teacher's K likeliest tokens, in nats.

        loss[s, b] = sum_k p_t (log p_t - log p_s),   k over the K tokens, and the tail if it counts
        d loss / d student_logits = (p_s - p_t) / T at the K tokens;
                                    elsewhere 0 (drop) or p_s (1 - P_t / P_s) / T (tail)

    drop: p is normalised over the K tokens. tail: p is over the K tokens and one bucket of all
    others, whose mass is P.

    Args:
        student_logits: [S, B, v], any float dtype; gets the gradient.
        teacher: what is known of the teacher, at the same temperature.
        rest: ``drop`` or ``tail``.
        temperature: T > 0.
        vocab_size: the vocabulary before padding; None if no column is padding.
        tp_group: the ranks that together hold the vocabulary; None if this rank holds all of it.

    Returns:
        [S, B], equal on every rank of ``tp_group``; float32, or float64 if an input is.

    Cost: one all-gather of K floats per token, for the tail K + 2; none in backward. Kept for
    backward: the student's logits (by reference) and 3 K + 2 numbers per token.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")
    if rest not in RESTS:
        raise ValueError(f"rest must be one of {RESTS}, got {rest!r}.")
    columns = real_columns(student_logits, student_logits, vocab_size, tp_group)
    if teacher.tokens.size(-1) == _whole(student_logits, vocab_size, tp_group):
        rest = DROP  # there is no rest
    return _TopKKL.apply(student_logits, *teacher, rest, temperature, columns, tp_group)


class _TopKKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, tokens, log_probs, rest, temperature, columns, tp_group):
        rank = tp_group.rank() if tp_group is not None else 0
        column = tokens - rank * student.size(-1)  # [S, B, K]
        is_own = (column >= 0) & (column < columns)
        column = torch.where(is_own, column, 0)
        dtype = torch.promote_types(compute_dtype(student, student), log_probs.dtype)
        own = student.gather(-1, column).to(dtype) if columns else torch.zeros_like(log_probs)
        lowest = torch.finfo(torch.float32).min
        stats = [torch.where(is_own, own, lowest)]  # [S, B, K]
        if rest == TAIL:
            stats.append(_tail(student, column, is_own, temperature, columns, dtype))
        stats = gather_ranks(torch.cat(stats, dim=-1), tp_group).double()  # [R, S, B, K (+ 2)]
        count = tokens.size(-1)
        chosen = stats[..., :count].amax(0) / temperature
        teacher = log_probs.double()
        if rest == TAIL:
            tail_max, tail_sum = stats[..., count].amax(0) / temperature, stats[..., count + 1]
            weight = (stats[..., count] / temperature - tail_max).exp()
            tail = (tail_max + (weight * tail_sum).sum(0).log()).unsqueeze(-1)
            chosen = torch.cat([chosen, tail], dim=-1)
            mass = (1 - teacher.exp().sum(-1, keepdim=True)).clamp(min=0)
            teacher = torch.cat([teacher, mass.log()], dim=-1)
        student_log_probs = chosen.log_softmax(-1)
        teacher = teacher.log_softmax(-1)
        p_t = teacher.exp()
        # 0 log 0 is 0: a teacher whose K tokens have all of its mass leaves the tail none.
        terms = torch.where(p_t == 0, 0, p_t * (teacher - student_log_probs))
        p_s = student_log_probs.exp()
        gaps = (p_s - p_t).to(dtype)  # [S, B, K], with a tail [S, B, K + 1]
        log_sum = chosen.logsumexp(-1).to(dtype)
        tail_gap = gaps.new_zeros(gaps.shape[:-1])
        if rest == TAIL:  # p_s (1 - P_t / P_s)
            ratio = p_t[..., -1] / p_s[..., -1].clamp(min=torch.finfo(torch.float64).tiny)
            tail_gap, gaps = (1 - ratio).to(dtype), gaps[..., :-1]
        ctx.save_for_backward(student, column, is_own, gaps, log_sum, tail_gap)
        ctx.rest, ctx.temperature, ctx.columns = rest, temperature, columns
        return not_below_zero(terms.sum(-1)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        student, column, is_own, gaps, log_sum, tail_gap = ctx.saved_tensors
        scale = (grad_loss / ctx.temperature).unsqueeze(-1)
        grad = torch.zeros_like(student)
        if ctx.columns == 0:
            return grad, None, None, None, None, None, None
        if ctx.rest == TAIL:
            for positions, s, _ in chunks(student, student, ctx.columns):
                center_(s, (log_sum * ctx.temperature)[positions], ctx.temperature)
                s.exp2_().mul_(tail_gap[positions].unsqueeze(-1)).mul_(scale[positions])
                grad[positions, :, : ctx.columns] = s
        # Assigned, not added: a sum of two roundings is no rounding of the sum. scatter_ needs a
        # column for the tokens of other ranks too: they write to the column of the first own token
        # what that one writes, or to column 0 what stands there. The host need not know which.
        values, first = (gaps * scale).to(grad.dtype), is_own.int().argmax(-1, keepdim=True)
        repeated = torch.where(is_own.gather(-1, first), values.gather(-1, first), grad[..., :1])
        column = torch.where(is_own, column, column.gather(-1, first))
        grad.scatter_(-1, column, torch.where(is_own, values, repeated))
        return grad, None, None, None, None, None, None


def _tail(
    student: Tensor,
    column: Tensor,
    is_own: Tensor,
    temperature: float,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return this rank's [S, B, 2]: maximum and sum of exponentials of the tokens that are left."""
    stats = student.new_zeros(*student.shape[:-1], 2, dtype=dtype)
    lowest = torch.finfo(torch.float32).min
    stats[..., 0] = lowest
    for positions, s, _ in chunks(student, student, columns):
        # Tokens of other ranks point at column 0, which is chosen only if an own token adds to it.
        own = is_own[positions].to(s.dtype)
        chosen = torch.zeros_like(s).scatter_add_(-1, column[positions], own) > 0  # [n, B, c]
        s.masked_fill_(chosen, lowest)
        stats[positions, :, 0] = s.amax(-1)
        center_(s, stats[positions, :, 0], temperature)
        stats[positions, :, 1] = s.exp2_().masked_fill_(chosen, 0).sum(-1)
    return stats
