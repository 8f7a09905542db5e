"""The modules to which importance listens, and what it makes of their tensors: a row per axis.

Shape letters are those of ``importance``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from megatron_ext.arch import Arch
from megatron_ext.arch.kinds import KINDS
from megatron_ext.pruning import native
from megatron_ext.pruning.aggregation import Aggregation
from megatron_ext.pruning.experts import ExpertTap, expert_input, expert_norm


def itself(x: Tensor) -> Tensor:
    """Return ``x``, which is aggregated as it is."""
    return x


@dataclass(frozen=True, kw_only=True)
class Tap:
    """A module that is listened to, and what is taken from it."""

    module: nn.Module
    tensors: Callable[[Tensor, Any], tuple[Tensor, ...]]
    """(first input, output) of the module -> tensors [s, B, ...]."""
    values: Callable[..., Tensor] = itself
    """Some positions of these tensors -> what is aggregated, [s, B, c]."""
    sums: Callable[..., Tensor | None] = native.unit_sums
    """(aggregation over positions, the tensors, left_out) -> what ``sums_over_positions`` makes of
    the values of all of them, [K, B, c]; None without a kernel. A function of ``native``."""


def first_input(before: Tensor, _: Any) -> tuple[Tensor]:
    """Return the module's input alone."""
    return (before,)


def input_and_output(before: Tensor, output: Any) -> tuple[Tensor, Tensor]:
    """Return the module's input and the first of its outputs."""
    return before, output[0] if isinstance(output, tuple) else output


def norm_output(norm: nn.Module, block: nn.Module) -> tuple[nn.Module, Callable]:
    """Return the module to listen to for the output of a norm, and how to take that from it.

    Transformer Engine norms inside the linear layer that follows; ``norm`` is an IdentityOp then,
    and the norm is computed a second time from the input of the first linear layer of ``block``.
    """
    if isinstance(norm, IdentityOp):
        linear = next(
            getattr(block, name)
            for name in ("linear_fc1", "linear_qkv", "in_proj")
            if hasattr(block, name)
        )
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


def gate(arch: Arch, _: Tensor, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor]:
    """Return what goes into the activation function; of fc1 [gate ; up] the gate."""
    x, bias = output
    x = x if bias is None else x + bias
    return (x.chunk(2, dim=-1)[0] if arch.is_gated else x,)


def head_norms(x: Tensor, channels: int) -> Tensor:
    """Return the L2 norm of each head, [s, B, c] float32, of [s, B, c * D]; D is ``channels``."""
    # .float() and not dtype=: twice as fast from bfloat16 on CPUs.
    return torch.linalg.vector_norm(x.float().unflatten(-1, (-1, channels)), dim=-1)


# The rows. Each function gets a layer, the sizes of the model and the choices of aggregation.


def layer_changes(layer: nn.Module, arch: Arch, how: Aggregation) -> list[Tap]:
    """Compare what enters a layer with what leaves it."""
    return [
        Tap(
            module=layer,
            tensors=input_and_output,
            values=one_minus_cosine,
            sums=native.change_sums,
        )
    ]


def both_norms(layer: nn.Module, arch: Arch, how: Aggregation) -> list[Tap]:
    """Listen to the outputs of a layer's two norms; a layer of a HybridModel has one of them."""
    if hasattr(layer, "mixer"):
        module, tensors = norm_output(layer.norm, layer.mixer)
        return [Tap(module=module, tensors=tensors)]
    norms = ((layer.input_layernorm, layer.self_attention), (layer.pre_mlp_layernorm, layer.mlp))
    places = [norm_output(*pair) for pair in norms if not isinstance(pair[1], IdentityOp)]
    return [Tap(module=module, tensors=tensors) for module, tensors in places]


def head_outputs(layer: nn.Module, arch: Arch, how: Aggregation) -> list[Tap]:
    """Listen to what heads hand to the output matrix."""
    tap = partial(Tap, module=layer.self_attention.linear_proj, tensors=first_input)
    if how.heads == "aggregate-first":
        return [tap()]
    channels = {"channels": arch.kv_channels}
    return [tap(values=partial(head_norms, **channels), sums=partial(native.head_sums, **channels))]


def norms_of_heads(x: Tensor, arch: Arch) -> Tensor:
    """Return the L2 norm of what was aggregated of each head: its channels, or one number."""
    return torch.linalg.vector_norm(x.unflatten(-1, (arch.num_attention_heads, -1)), dim=-1)


def projected_heads(layer: nn.Module, arch: Arch, how: Aggregation) -> list[Tap]:
    """Listen to x of all heads of a Mamba sub-layer, as it is projected: [S, B, c * P].

    arXiv:2504.11409, section 3: of z, x and dt, x ranks heads best.
    """

    def tensors(_: Tensor, output: tuple[Tensor, Any]) -> tuple[Tensor]:
        width = layer.mixer.d_inner_local_tp
        return (output[0][..., width : 2 * width].contiguous(),)

    return [Tap(module=layer.mixer.in_proj, tensors=tensors)]


def norms_over_mamba_heads(x: Tensor, arch: Arch) -> Tensor:
    """Return the L2 norm over heads of what was aggregated of each of their channels."""
    return torch.linalg.vector_norm(x.unflatten(-1, (arch.mamba_num_heads, -1)), dim=-2)


def neurons(mlp: nn.Module, arch: Arch, how: Aggregation) -> list[Tap]:
    """Listen to the neurons of an MLP behind its activation function, or before it."""
    if how.neurons == "pre":
        return [Tap(module=mlp.linear_fc1, tensors=partial(gate, arch))]
    return [Tap(module=mlp.linear_fc2, tensors=first_input)]


def expert_outputs(layer: nn.Module, arch: Arch, how: Aggregation) -> list[ExpertTap]:
    """Listen to what each expert returns."""
    return [ExpertTap(mlp=layer.mlp, linear="linear_fc2", values=expert_norm, is_split=False)]


def expert_neurons(layer: nn.Module, arch: Arch, how: Aggregation) -> list[ExpertTap]:
    """Listen to the neurons of each expert, as ``neurons``."""
    if how.neurons == "pre":

        def values(before: Tensor, output: Any, _: Any) -> Tensor:
            return gate(arch, before, output)[0]

        return [ExpertTap(mlp=layer.mlp, linear="linear_fc1", values=values, is_split=True)]
    return [ExpertTap(mlp=layer.mlp, linear="linear_fc2", values=expert_input, is_split=True)]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Measurement of the units of an axis."""

    taps: Callable[[nn.Module, Arch, Aggregation], Sequence[Tap | ExpertTap]]
    """Taps of one layer."""
    count: Callable[[Arch], int] = lambda arch: 1
    """Number of taps of a layer; a unit's score is the sum of theirs."""
    tp_split: bool = False
    """The tap sees a tensor-parallel rank's share of the units, at all positions; otherwise all
    units, under sequence parallelism at the rank's own positions. (``Axis.tp_split`` is about
    weights.)"""
    of_layer: bool = False
    """The unit is the layer: one mean over positions and samples, whatever the aggregation."""
    numbers: Callable[[Arch, Aggregation], int] = lambda arch, how: 1
    """Number of values that are aggregated of a unit."""
    scores: Callable[[Tensor, Arch], Tensor] = lambda x, arch: x
    """Unit scores of a layer from the aggregated values, [taps, c] -> [taps, units]; sizes are the
    layer's."""


MEASURES = {
    "layers": Measure(taps=layer_changes, of_layer=True),
    **dict.fromkeys(KINDS, Measure(taps=layer_changes, of_layer=True)),
    "hidden": Measure(taps=both_norms, count=lambda arch: 1 if arch.is_hybrid else 2),
    "heads": Measure(
        taps=head_outputs,
        tp_split=True,
        numbers=lambda arch, how: arch.kv_channels if how.heads == "aggregate-first" else 1,
        scores=norms_of_heads,
    ),
    "ffn": Measure(taps=lambda layer, *rest: neurons(layer.mlp, *rest), tp_split=True),
    # Of each channel of each head: which channels count, the planner knows.
    "mamba_heads": Measure(
        taps=projected_heads, tp_split=True, numbers=lambda arch, how: arch.mamba_head_dim
    ),
    "mamba_channels": Measure(
        taps=projected_heads,
        tp_split=True,
        numbers=lambda arch, how: arch.mamba_num_heads,
        scores=norms_over_mamba_heads,
    ),
    # Sums of experts are sent back to the rank that owns the tokens, which then holds all units at
    # its own positions: not tp_split, though the weights are.
    "experts": Measure(taps=expert_outputs),
    "moe_ffn": Measure(taps=expert_neurons),
    "shared_ffn": Measure(
        taps=lambda layer, *rest: neurons(layer.mlp.shared_experts, *rest), tp_split=True
    ),
}
"""By the names of ``axes``."""
