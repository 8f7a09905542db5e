"""Output layers and losses of teacher and student as one: no logits of all positions.

Shape letters are those of ``chunks``; H is the hidden size of either model.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# (student logits [n, B, v], teacher logits [n, B, v], labels [B, n]) -> {name: loss [B, n]}.
# The loss at a position depends on that position's logits only.
Losses = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]

# Tokens whose logits exist at a time. Matrix products want more rows than the losses do.
CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}
# On a CPU, at most so many elements of the weight's gradient are computed at once, in a temporary
# tensor of that size.
CHUNK_PRODUCT = 2**22


def fused_losses(
    losses: Losses,
    objective: Mapping[str, float],
    student_states: Tensor,
    student_weight: Tensor,
    teacher_states: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
) -> dict[str, Tensor]:
    """Return ``losses`` of two output layers, chunk by chunk of positions.

    Gradients are made in forward, while the logits are there, for what is minimised: the sum over
    ``objective`` and tokens of weight x loss x mask, times any one number. Backward only multiplies
    by that number, which it takes from the gradient that arrives; any other gradient than of this
    sum comes out wrong.

    Args:
        losses: of logits, with their collectives; all ranks of a tensor-parallel group have as many
            chunks.
        objective: the weight of each loss in what is minimised.
        student_states: [S, B, H], what the output layer takes. Gets a gradient: this rank's part
            under tensor parallelism, to be summed over its ranks.
        student_weight: [v, H]. Gets a gradient, summed over chunks in float32.
        teacher_states: [S, B, H].
        teacher_weight: [v, H].
        labels: [B, S].
        loss_mask: [B, S].
        biases: student's and teacher's, [v] each, of output layers that have one. The student's
            gets a gradient as its weight does.

    Returns:
        {name: [B, S]}.

    Kept for backward: the gradients of states, weight and bias, in float32.
    """
    names: list[str] = []
    found = _Fused.apply(
        losses,
        objective if torch.is_grad_enabled() else {},
        names,
        student_states,
        student_weight,
        biases[0],
        teacher_states.detach(),
        teacher_weight.detach(),
        None if biases[1] is None else biases[1].detach(),
        labels,
        loss_mask,
    )
    return dict(zip(names, found, strict=True))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        losses,
        objective,
        names,
        states,
        weight,
        bias,
        teacher_states,
        teacher_weight,
        teacher_bias,
        labels,
        loss_mask,
    ):
        wide = torch.promote_types(weight.dtype, torch.float32)
        if objective:
            grad_states = torch.empty_like(states, dtype=wide)
            grad_weight = torch.zeros_like(weight, dtype=wide)
            grad_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        found: dict[str, list[Tensor]] = {}
        for positions in _chunks(states):
            logits = F.linear(states[positions], weight, bias).requires_grad_(bool(objective))
            teacher_logits = F.linear(teacher_states[positions], teacher_weight, teacher_bias)
            with torch.set_grad_enabled(bool(objective)):
                part = losses(logits, teacher_logits, labels[:, positions])
            for name, loss in part.items():
                found.setdefault(name, []).append(loss.detach())
            if objective:
                mask = loss_mask[:, positions]
                (grad,) = torch.autograd.grad(
                    [part[name] for name in objective],
                    logits,
                    [(factor * mask).to(part[name].dtype) for name, factor in objective.items()],
                )
                grad_states[positions] = grad @ weight
                _add_product(grad_weight, grad.flatten(0, 1).t(), states[positions].flatten(0, 1))
                if bias is not None:
                    grad_bias += grad.sum(dim=(0, 1), dtype=wide)
        names.extend(found)
        if objective:
            ctx.save_for_backward(grad_states, grad_weight, grad_bias, loss_mask)
            ctx.dtypes = states.dtype, weight.dtype, weight.dtype  # the last: of the bias
            ctx.factors = [objective.get(name, 0.0) for name in names]
        return tuple(torch.cat(parts, dim=1) for parts in found.values())

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        *gradients, loss_mask = ctx.saved_tensors
        number, grad = next(
            (f, g) for f, g in zip(ctx.factors, grads, strict=True) if f and g is not None
        )
        # Without a token that counts, all gradients are zero whatever ``scale`` is. Gradients are
        # scaled in place: backward runs once.
        scale = grad.sum() / (number * loss_mask.sum()).clamp(min=1e-30)
        scaled = (
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return None, None, None, *scaled, None, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``total``, which may be wider."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    if total.is_cuda:  # the product adds itself up: no second tensor of its size
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
        return
    count = max(1, CHUNK_PRODUCT // total.size(1))
    for part, rows in zip(total.split(count), left.split(count), strict=True):
        part += rows @ right


def _chunks(states: Tensor) -> Iterator[slice]:
    """Yield positions, the same on all tensor-parallel ranks."""
    tokens = CHUNK_TOKENS.get(states.device.type, CHUNK_TOKENS["cuda"])
    count = max(1, tokens // states.size(1))
    for first in range(0, states.size(0), count):
        yield slice(first, first + count)
