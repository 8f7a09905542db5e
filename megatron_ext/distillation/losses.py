"""Distillation losses on vocabulary-parallel logits.

Shape letters are those of ``chunks``. Every loss returns one value per token, [S, B], equal on all
tensor-parallel ranks. Masking, weighting and averaging happen once, where the losses are used.

``LogitLoss`` is what the flags ask for. How each loss is computed stands in ``steps`` and ``topk``.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ext.distillation.steps import COSINE, FORWARD_KL, MSE, REVERSE_KL, jsd, per_token_loss
from megatron_ext.distillation.topk import DROP, teacher_top_k, vocab_parallel_top_k_kl

KD_LOSS, LM_LOSS, HIDDEN_LOSS = "kd loss", "lm loss", "hidden loss"
"""Names of the losses of a step, wherever they are reported."""


@dataclass(frozen=True, kw_only=True)
class LogitLoss:
    """A logit loss with its settings."""

    kind: str = "forward-kl"
    """forward-kl, reverse-kl, jsd, mse or cosine."""
    temperature: float = 1.0
    temperature_squared: bool = False
    """Multiply by temperature**2 (Hinton et al. 2015): the gradient then keeps its size."""
    beta: float = 0.5
    """Weight of the teacher in jsd's mixture."""
    top_k: int | None = None
    """Forward KL over the teacher's likeliest tokens; None for the whole vocabulary."""
    top_k_rest: str = DROP
    """Treatment of the other tokens, see ``topk``."""

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        vocab_size: int | None = None,
        tp_group: ProcessGroup | None = None,
    ) -> Tensor:
        """Return the loss per token, [S, B]; arguments as of ``vocab_parallel_kl``."""
        where = {"vocab_size": vocab_size, "tp_group": tp_group, "temperature": self.temperature}
        if self.top_k is not None:
            top = teacher_top_k(teacher_logits, self.top_k, **where)
            loss = vocab_parallel_top_k_kl(student_logits, top, rest=self.top_k_rest, **where)
        elif self.kind == "jsd":
            loss = vocab_parallel_jsd(student_logits, teacher_logits, beta=self.beta, **where)
        else:
            loss = LOSSES[self.kind](student_logits, teacher_logits, **where)
        return loss * self.temperature**2 if self.temperature_squared else loss


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
    return per_token_loss(
        FORWARD_KL, student_logits, teacher_logits, temperature, vocab_size, tp_group
    )


def vocab_parallel_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Per-token reverse KL(student || teacher) in nats.

        loss[s, b] = sum_V p_s (log p_s - log p_t)
        d loss / d student_logits = p_s (log p_s - log p_t - loss) / T

    Arguments, result, errors and cost as of ``vocab_parallel_kl``; 5 floats per token are kept.
    """
    return per_token_loss(
        REVERSE_KL, student_logits, teacher_logits, temperature, vocab_size, tp_group
    )


def vocab_parallel_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Per-token generalised Jensen-Shannon divergence in nats (Agarwal et al. 2023, section 2).

        m = beta p_t + (1 - beta) p_s
        loss[s, b] = beta KL(p_t || m) + (1 - beta) KL(p_s || m)
        d loss / d student_logits = (1 - beta) p_s (log p_s - log m - KL(p_s || m)) / T

    Symmetric at beta = 1/2, where it is at most log 2; over beta it tends to forward KL for
    beta -> 0, over 1 - beta to reverse KL for beta -> 1.

    Arguments, result and errors as of ``vocab_parallel_kl``; beta within (0, 1). Cost: one
    all-gather of 4 floats per token and one of 2, because the mixture needs both normalisers.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must be within 0 and 1, got {beta}.")
    steps = jsd(beta)
    return per_token_loss(steps, student_logits, teacher_logits, temperature, vocab_size, tp_group)


def vocab_parallel_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Per-token squared distance of the two distributions.

        loss[s, b] = sum_V (p_s - p_t)^2
        d loss / d student_logits = 2 p_s (p_s - p_t - sum_V p_s (p_s - p_t)) / T

    Of probabilities, as every Loss(p_t, p_s) of arXiv:2407.14679, section 3; a sum and not a mean,
    which would shrink with the vocabulary.

    Arguments, result and errors as of ``vocab_parallel_kl``. Cost: one all-gather of 7 floats per
    token. In float32 the value is off by up to 1e-7 times sum_V p_s^2; the gradient is not.
    """
    return per_token_loss(MSE, student_logits, teacher_logits, temperature, vocab_size, tp_group)


def vocab_parallel_cosine(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Per-token cosine distance of the two distributions, 0 to 1.

        loss[s, b] = 1 - p_s . p_t / (|p_s| |p_t|)
        d loss / d student_logits = p_s (p_s (p_s . p_t) / |p_s|^2 - p_t) / (|p_s| |p_t| T)

    Arguments, result, errors and cost as of ``vocab_parallel_mse``.
    """
    return per_token_loss(COSINE, student_logits, teacher_logits, temperature, vocab_size, tp_group)


LOSSES = {
    "forward-kl": vocab_parallel_kl,
    "reverse-kl": vocab_parallel_reverse_kl,
    "mse": vocab_parallel_mse,
    "cosine": vocab_parallel_cosine,
}
