"""The state-space recurrence of Mamba 2 and its short convolution in plain torch.

They stand in for mamba_ssm's kernels, which need a GPU. All are ordinary operations: autograd has
their backward.

Shape letters in this file:
    S  positions            B  micro-batch           h  heads, h / g of each group
    P  channels of a head   N  channels of a state   g  groups
    Q  positions of a chunk c  chunks
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Positions that are computed together. Scores take Q numbers of a position and head, states
# P N / Q: together they are fewest at Q = sqrt(P N), 64 to 102 in the models that are known.
CHUNK = 64


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return each channel's convolution with its last K positions, zeros before the first.

        y_t = bias + sum_k weight_k x_{t - K + 1 + k}

    Args:
        x: [S, B, C].
        weight: [C, 1, K], as of a depthwise Conv1d; its last tap is of the position itself.
        bias: [C].

    Returns:
        [S, B, C], in the dtype of ``x``.
    """
    taps = weight.squeeze(1).unbind(-1)
    before = F.pad(x, (0, 0, 0, 0, len(taps) - 1, 0))  # [K - 1 + S, B, C]
    return sum((before[k : k + len(x)] * tap for k, tap in enumerate(taps)), start=bias)


def scan(x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return what every head reads of its state, a chunk of positions at a time.

        state_t = exp(dt_t decay) state_{t-1} + dt_t x_t b_t^T        y_t = state_t c_t

    arXiv:2405.21060, section 6: within a chunk this is a product of matrices, as attention whose
    scores are c_t . b_s and the decay from s to t; from chunk to chunk only states are handed on.
    Forward and backward keep S Q h numbers and S / Q states of a head: linear in S.

    Args:
        x: [S, B, h, P].
        dt: [S, B, h], steps, not negative.
        decay: [h], negative.
        b: [S, B, g, N], what a position writes; heads h / g of a group share it.
        c: [S, B, g, N], what it reads.
        chunk: Q.

    Returns:
        [S, B, h, P] in the dtype of ``x``; computed in float32 at least.
    """
    length, heads, groups, dtype = len(x), x.size(2), b.size(2), x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    # A step of 0 neither decays nor writes: it pads the last chunk.
    size = min(chunk, length)
    x, dt, b, c = (_in_chunks(each.to(wide), size) for each in (x, dt, b, c))
    x = (x * dt.unsqueeze(-1)).unflatten(3, (groups, -1))  # [B, c, Q, g, h/g, P]
    fall = (dt * decay.to(wide)).cumsum(2).unflatten(3, (groups, -1))  # [B, c, Q, g, h/g]
    fall = fall.permute(0, 1, 3, 4, 2)  # [B, c, g, h/g, Q]: logarithm of the decay since its start

    # Within the chunk: scores [B, c, g, h/g, Q, Q].
    later = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    between = (fall.unsqueeze(-1) - fall.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    scores = torch.einsum("zktgn,zksgn->zkgts", c, b).unsqueeze(3) * between
    y = torch.einsum("zkgrts,zksgrp->zktgrp", scores, x)

    # What each chunk adds to the state until its end, [B, c, g, h/g, P, N]; the states before each.
    left = (fall[..., -1:] - fall).exp()
    added = torch.einsum("zkgrs,zksgrp,zksgn->zkgrpn", left, x, b)
    states = _handed_on(added, fall[..., -1].exp())
    y = y + torch.einsum("zkgrt,zkgrpn,zktgn->zktgrp", fall.exp(), states, c)

    y = y.flatten(1, 2).flatten(2, 3)[:, :length]  # [B, S, h, P]
    assert y.size(2) == heads
    return y.transpose(0, 1).to(dtype)


def _in_chunks(x: Tensor, size: int) -> Tensor:
    """Return [B, c, Q, ...] of [S, B, ...], zeros behind the last position."""
    missing = -len(x) % size
    x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing))
    return x.transpose(0, 1).unflatten(1, (-1, size))


def _handed_on(added: Tensor, decay: Tensor) -> Tensor:
    """Return the state before each chunk, [B, c, g, h/g, P, N].

    Args:
        added: of the same shape.
        decay: [B, c, g, h/g], over a whole chunk.
    """
    state, states = torch.zeros_like(added[:, 0]), []
    for chunk, left in zip(added.unbind(1), decay.unbind(1), strict=True):
        states.append(state)
        state = left[..., None, None] * state + chunk
    return torch.stack(states, 1)
