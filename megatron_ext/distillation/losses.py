"""Distillation losses on vocabulary-parallel logits.

Shape letters in this file:
    S  sequence positions on this rank      v  padded vocabulary / R, the columns this rank holds
    B  micro-batch                          c  columns of this rank that are real vocabulary
    R  tensor-parallel ranks

Every loss returns one value per token, [S, B], equal on all tensor-parallel ranks. Masking,
weighting and averaging happen once, where the losses are used.

A loss is a public function (formula, checks) and an autograd function made of three steps: row
statistics in chunks, one gather that combines the ranks, the closed-form gradient in chunks.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

# Elements of one chunk buffer, of which three are alive. On a CPU they should stay in cache
# (16 rows of 32k columns); on a GPU a kernel should outlast its launch.
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}

LOG2_E = 1 / math.log(2)


def vocab_parallel_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Per-token forward KL(teacher || student) in nats.

        loss[s, b] = sum_V p_t (log p_t - log p_s),    p = softmax(logits / T) over the vocabulary
        d loss / d student_logits = (p_s - p_t) / T

    L_logits of arXiv:2407.14679, section 3, before its mean over tokens. There is no factor T**2,
    as in the paper; Hinton et al. 2015 multiply by it to keep the gradient's size independent of T.

    Args:
        student_logits: [S, B, v_s], any float dtype. The only input that receives a gradient.
        teacher_logits: [S, B, v_t]. Rank r holds columns [r * v, (r + 1) * v) of either model.
        temperature: T > 0.
        vocab_size: the vocabulary before padding. Columns beyond it take no part, whatever they
            hold, and get a gradient of zero. None: every column is real.
        tp_group: the ranks that together hold the vocabulary; None if this rank holds all of it.

    Returns:
        [S, B], equal on every rank of ``tp_group``; float32, or float64 if either input is.

    Raises:
        ValueError: bad temperature or vocab_size, other leading sizes, or v_s != v_t. On one rank
            v_s may differ from v_t if vocab_size is given. On several it may not: rank r would
            hold other columns of the teacher than of the student.

    Real columns must be finite: -inf in both models gives nan. Neither logits may be changed in
    place before backward. (Megatron's cross entropy overwrites float32 logits: give it a copy.)

    Precision in float32: the value is off by 1e-7 nats on average and less than 1e-6 (measured
    with 32k and 152k columns), so a smaller KL is noise, never negative. The gradient does not
    depend on the value: where log p_s and log p_t differ by 1e-3 it is still right to 5e-4.

    Cost: one all-gather of 5 floats per token in forward, none in backward. Kept for backward: both
    logits (by reference) and 4 floats per token. The one new tensor of the logits' size is the
    student's gradient, in the student's dtype and rounded once.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")
    columns = _real_columns(student_logits, teacher_logits, vocab_size, tp_group)
    return _VocabParallelKL.apply(
        student_logits, teacher_logits.detach(), temperature, columns, tp_group
    )


class _VocabParallelKL(torch.autograd.Function):
    """Written by hand because autograd would keep float32 copies of the logits.

    It would also differentiate through the gather, which multiplies the gradient by R.
    """

    @staticmethod
    def forward(ctx, student, teacher, temperature, columns, tp_group):
        stats = _kl_stats(student, teacher, temperature, columns)  # [5, S, B]
        kl, row_max, row_sum = _combine_kl(_gather(stats, tp_group).double(), temperature)
        ctx.save_for_backward(student, teacher, row_max.to(stats.dtype), row_sum.to(stats.dtype))
        ctx.temperature, ctx.columns = temperature, columns
        return kl.to(stats.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        student, teacher, row_max, row_sum = ctx.saved_tensors
        # No all-reduce: the loss is replicated over tp_group, and therefore grad_loss is too.
        # Maxima and sums, not log-sum-exps: their rounding would shift a whole row of p_s - p_t.
        scale = (grad_loss / ctx.temperature / row_sum).unsqueeze(-1)  # [2, S, B, 1]
        grad = torch.empty_like(student)
        grad[..., ctx.columns :].zero_()
        for rows, s, t in _chunks(student, teacher, ctx.columns):
            _center_(s, row_max[0, rows], ctx.temperature).exp2_().mul_(scale[0, rows])
            _center_(t, row_max[1, rows], ctx.temperature).exp2_().mul_(scale[1, rows])
            grad[rows, :, : ctx.columns] = s.sub_(t)
        return grad, None, None, None, None


def _kl_stats(student: Tensor, teacher: Tensor, temperature: float, columns: int) -> Tensor:
    """Return this rank's [5, S, B]: max s, max t, sum 2^s', sum 2^t', sum 2^t' (t' - s').

    s' and t' are centred on the rank's maxima: a product with the raw logits would lose to
    rounding what the difference of two similar models is made of.
    """
    stats = student.new_zeros(5, *student.shape[:-1], dtype=_compute_dtype(student, teacher))
    # For a rank that holds only padding: loses every max, and stays finite in the arithmetic.
    stats[:2] = torch.finfo(torch.float32).min
    for rows, s, t in _chunks(student, teacher, columns):
        torch.amax(s, -1, out=stats[0, rows])
        torch.amax(t, -1, out=stats[1, rows])
        _center_(s, stats[0, rows], temperature)
        _center_(t, stats[1, rows], temperature)
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


def _real_columns(
    student: Tensor, teacher: Tensor, vocab_size: int | None, tp_group: ProcessGroup | None
) -> int:
    """Return c, the leading columns of this rank that are vocabulary, after checking the shapes."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} "
            "differ in more than the vocabulary."
        )
    tp_size, tp_rank = (tp_group.size(), tp_group.rank()) if tp_group is not None else (1, 0)
    v_s, v_t = student.size(-1), teacher.size(-1)
    if v_s != v_t and (tp_size > 1 or vocab_size is None):
        fix = (
            f"with {tp_size} tensor-parallel ranks a rank then holds other columns of each; pad "
            "both vocabularies alike (--make-vocab-size-divisible-by)"
            if tp_size > 1
            else "give vocab_size, the vocabulary before padding"
        )
        raise ValueError(f"student logits have {v_s} columns, teacher logits {v_t}: {fix}.")
    width = min(v_s, v_t)
    if vocab_size is None:
        vocab_size = width * tp_size
    if not 0 < vocab_size <= width * tp_size:
        raise ValueError(
            f"vocab_size {vocab_size} must be within 1 and {width * tp_size}, "
            f"the padded vocabulary ({width} columns x {tp_size} tensor-parallel ranks)."
        )
    return min(max(vocab_size - tp_rank * width, 0), width)


def _chunks(
    student: Tensor, teacher: Tensor, columns: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (positions, s, t) over all S: copies [n, B, c] to work on in place, wider than bf16.

    The two buffers are the same for every chunk. Nothing is yielded if this rank has no column.
    """
    if columns == 0:
        return
    num_positions, batch, _ = student.shape
    elements = CHUNK_ELEMENTS.get(student.device.type, CHUNK_ELEMENTS["cuda"])
    step = max(1, elements // max(1, batch * columns))
    buffers = student.new_empty(
        2, min(step, num_positions), batch, columns, dtype=_compute_dtype(student, teacher)
    )
    for start in range(0, num_positions, step):
        rows = slice(start, start + step)
        s, t = buffers[:, : num_positions - start]
        s.copy_(student[rows, :, :columns])
        t.copy_(teacher[rows, :, :columns])
        yield rows, s, t


def _compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Float32 at least; float64 if either of the logits is."""
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def _center_(x: Tensor, row_max: Tensor, temperature: float) -> Tensor:
    """Replace x by (x - row_max) * log2(e) / T, in this order: large logits lose no digits.

    In bits because exp2 is 4 times as fast as exp (torch 2.13 with MKL, one Zen 4 core).
    """
    return x.sub_(row_max.unsqueeze(-1)).mul_(LOG2_E / temperature)


def _gather(stats: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """Return [R, ...], the ``stats`` of all ranks. No collective on one rank."""
    if tp_group is None or tp_group.size() == 1:
        return stats.unsqueeze(0)
    gathered = stats.new_empty(tp_group.size(), *stats.shape)
    torch.distributed.all_gather(list(gathered.unbind(0)), stats, group=tp_group)
    return gathered
