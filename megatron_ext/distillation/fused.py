"""Output layers and losses of teacher and student as one: no logits of all positions.

Shape letters are those of ``chunks``; H is the hidden size of either model.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# (student logits [n, B, v], teacher logits [n, B, v], labels [B, n]) -> {name: loss [B, n]}.
# What a position loses depends on its own logits only.
Losses = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]

# Elements of the logits of a chunk, of which a few are alive. A matrix product wants more rows than
# a loss does.
LOGITS_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}


def fused_losses(
    losses: Losses,
    student_states: Tensor,
    student_weight: Tensor,
    teacher_states: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
) -> dict[str, Tensor]:
    """Return ``losses`` of two output layers, chunk by chunk of positions.

    Args:
        losses: of logits. Called twice for each chunk, in forward and again in backward, with the
            collectives that it has; all ranks of a tensor-parallel group have as many chunks.
        student_states: [S, B, H], what the output layer takes. Gets a gradient: this rank's part
            under tensor parallelism, to be summed over its ranks.
        student_weight: [v, H]. Gets a gradient, summed over chunks in float32.
        teacher_states: [S, B, H].
        teacher_weight: [v, H].
        labels: [B, S].

    Returns:
        {name: [B, S]}.

    Cost: both output layers are computed twice, since gradients of the losses are not known in
    forward. Kept for backward: the arguments, by reference.
    """
    names: list[str] = []
    found = _Fused.apply(
        losses,
        names,
        student_states,
        student_weight,
        teacher_states.detach(),
        teacher_weight.detach(),
        labels,
    )
    return dict(zip(names, found, strict=True))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, losses, names, states, weight, teacher_states, teacher_weight, labels):
        found: dict[str, list[Tensor]] = {}
        for rows in _chunks(states, weight):
            part = losses(
                F.linear(states[rows], weight),
                F.linear(teacher_states[rows], teacher_weight),
                labels[:, rows],
            )
            for name, loss in part.items():
                found.setdefault(name, []).append(loss)
        names.extend(found)
        ctx.losses, ctx.names = losses, names
        ctx.save_for_backward(states, weight, teacher_states, teacher_weight, labels)
        return tuple(torch.cat(parts, dim=1) for parts in found.values())

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        states, weight, teacher_states, teacher_weight, labels = ctx.saved_tensors
        wanted = {n: g for n, g in zip(ctx.names, grads, strict=True) if g is not None}
        grad_states = torch.empty_like(states)
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        for rows in _chunks(states, weight):
            logits = F.linear(states[rows], weight).requires_grad_()
            teacher_logits = F.linear(teacher_states[rows], teacher_weight)
            with torch.enable_grad():
                part = ctx.losses(logits, teacher_logits, labels[:, rows])
            (grad_logits,) = torch.autograd.grad(
                [part[name] for name in wanted], logits, [g[:, rows] for g in wanted.values()]
            )
            grad_states[rows] = grad_logits @ weight
            grad_weight += grad_logits.flatten(0, 1).t() @ states[rows].flatten(0, 1)
        return None, None, grad_states, grad_weight.to(weight.dtype), None, None, None


def _chunks(states: Tensor, weight: Tensor) -> Iterator[slice]:
    """Yield positions whose logits are few enough; the same on all tensor-parallel ranks."""
    elements = LOGITS_ELEMENTS.get(states.device.type, LOGITS_ELEMENTS["cuda"])
    count = max(1, elements // (states.size(1) * weight.size(0)))
    for first in range(0, states.size(0), count):
        yield slice(first, first + count)
