"""A plain MLP, gated or not: the sub-layer ``-``.

Named dims:
    ffn       ffn_hidden_size                              input of the second matrix
    fc1       ffn, or gated [gate ; up]                    output of the first matrix
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ext.arch.rows import (
    REQUIRED,
    Axis,
    Size,
    Weight,
    gate_and_up,
    linear,
    norm,
    norm_behind,
    one_each,
    one_row,
    size,
    sublayers,
)

if TYPE_CHECKING:
    from megatron_ext.arch.sizes import Arch

NAME, SYMBOL = "mlp", "-"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of an MLP; each is a field of ``Arch``. Experts compute the same activation."""

    ffn_hidden_size: int = size(
        REQUIRED,
        "neurons of an MLP; default 4 hidden-size, with --swiglu 2/3 of it",
        typed=None,
        at_least=1,
    )
    swiglu: bool = size(False, "gated MLP with SiLU instead of GELU")
    geglu: bool = False
    """Gated MLP with GELU in its tanh approximation. No flag: it comes with a checkpoint."""
    squared_relu: bool = size(False, "squared ReLU instead of GELU")
    bias_gelu_fusion: bool = size(
        False,
        "exact GELU; without it a GELU with biases is its tanh approximation",
        typed=True,
        off="--no-bias-gelu-fusion",
    )
    """GELU in its tanh approximation, as Megatron-LM's fused kernel has it; needs biases."""

    @property
    def is_gated(self) -> bool:
        """Whether the first matrix returns [gate ; up]."""
        return self.swiglu or self.geglu


def is_gelu(sizes: Mapping[str, Any]) -> bool:
    """Whether the MLP that ``sizes`` (fields of ``Arch`` by name) describe computes a GELU."""
    return not any(sizes.get(name) for name in ("swiglu", "geglu", "squared_relu"))


def problems(arch: "Arch") -> Iterator[str]:
    """Yield how these sizes contradict each other."""
    if arch.swiglu and arch.squared_relu:
        yield "--swiglu and --squared-relu contradict each other: give one."
    if arch.geglu and (arch.swiglu or arch.squared_relu or arch.bias_gelu_fusion):
        yield "geglu goes with no other activation."


def dims(arch: "Arch") -> dict[str, int]:
    """Return the length of every named dim."""
    return {
        "ffn": arch.ffn_hidden_size,
        "fc1": arch.ffn_hidden_size * (1 + arch.is_gated),
    }


def weights(arch: "Arch", layer: str) -> list[Weight]:
    """Return the rows of the table; ``layer`` is what their names begin with."""
    mlp, bias = f"{layer}mlp.", arch.add_bias_linear
    rows = norm(arch, f"{mlp}linear_fc1.layer_norm_", kind=NAME)
    rows += linear(f"{mlp}linear_fc1", ("fc1", "hidden"), bias=bias, kind=NAME)
    fc2 = f"{mlp}linear_fc2"
    rows += linear(fc2, ("hidden", "ffn"), bias=bias, init="scaled", kind=NAME)
    return rows + norm_behind(arch, fc2, kind=NAME)


def multiply_adds(arch: "Arch", seq_length: int) -> int:
    """Return one token's multiply-adds outside of weight matrices."""
    return 0


DEPTH = sublayers(NAME, "LM", "MLP sub-layers")
AXES = (
    Axis(
        name="ffn",
        kind=NAME,
        size=Size(
            name="ffn_hidden_size",
            letter="F",
            help="neurons of each MLP",
            rows=one_row,
            by_layer=True,
        ),
        dims={"ffn": one_each("ffn_hidden_size"), "fc1": gate_and_up("ffn_hidden_size")},
        tp_split=True,
        exists=lambda arch: NAME in arch.kinds,
    ),
)
UNCUT = ()
