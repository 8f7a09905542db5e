"""Where importance listens in a layer, and what it makes of the tensors there.

Shape letters are those of ``importance``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from megatron_ext.pruning.aggregation import OverSamples


@dataclass(frozen=True)
class Tap:
    """A module that is listened to, what is taken from it, and where that belongs."""

    axis: str
    row: tuple[int, int]
    """(layer, tap of this axis in the layer), global numbers from 0."""
    module: nn.Module
    tensors: Callable[[Tensor, Any], tuple[Tensor, ...]]
    """(first input, output) of the module -> tensors [s, B, ...]."""
    values: Callable[..., Tensor]
    """Some positions of these tensors -> what is aggregated, [s, B, c]."""
    sums: Callable[..., Tensor | None]
    """(aggregation over positions, the tensors, left_out) -> what ``sums_over_positions`` makes of
    the values of all of them, [K, B, c]; None without a kernel. A function of ``native``."""
    samples: OverSamples


def first_input(before: Tensor, _: Any) -> tuple[Tensor]:
    """Return the module's input alone."""
    return (before,)


def input_and_output(before: Tensor, output: Any) -> tuple[Tensor, Tensor]:
    """Return the module's input and the first of its outputs."""
    return before, output[0] if isinstance(output, tuple) else output


def itself(x: Tensor) -> Tensor:
    """Return ``x``, which is aggregated as it is."""
    return x


def norm_output(norm: nn.Module, block: nn.Module) -> tuple[nn.Module, Callable]:
    """Return the module to listen to for the output of a norm, and how to take that from it.

    Transformer Engine norms inside the linear layer that follows; ``norm`` is an IdentityOp then,
    and the norm is computed a second time from the input of that layer, or of the MLP's first.
    """
    if isinstance(norm, IdentityOp):
        linear = getattr(block, "linear_fc1", block)
        return linear, lambda x, _: (norm_inside(linear, x),)
    return norm, lambda _, y: (y,)


def norm_inside(linear: nn.Module, x: Tensor) -> Tensor:
    """Return the norm inside a Transformer Engine LayerNormLinear, [s, B, H] in and out."""
    weight = linear.layer_norm_weight + (1 if linear.zero_centered_gamma else 0)
    if linear.normalization == "RMSNorm":
        return F.rms_norm(x, weight.shape, weight, linear.eps)
    return F.layer_norm(x, weight.shape, weight, linear.layer_norm_bias, linear.eps)


def one_minus_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Return 1 - cos of two [s, B, H], [s, B, 1] float32."""
    x, y = x.float(), y.float()
    lengths = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
    cosine = (x * y).sum(dim=-1) / lengths.clamp_min_(1e-12)
    # A layer that changes nothing must not score below 0 by rounding.
    return (1 - cosine).clamp_(0, 2).unsqueeze(-1)
