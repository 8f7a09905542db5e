"""Scores: one float per prunable unit, and the file that holds them.

A unit's score says how much it matters: higher means keep. Vectors are float32, over the whole
model, in global numbering from 0:

    hidden        [hidden_size]          channels of the residual stream
    ffn.{layer}   [ffn_hidden_size]      neurons of one layer, as many as this one has
    heads.{layer} [num_attention_heads]  query heads of one layer
    layers        [num_layers]           whole layers
    experts.{layer}           [num_experts]            in a mixture of experts, instead of ffn:
    moe_ffn.{layer}.{expert}  [moe_ffn_hidden_size]    neurons of one expert
    shared_ffn.{layer}        [moe_shared_expert_intermediate_size]  of the shared experts
    layer_blocks.{n} [num_layers - n + 1]  n layers from each on, where blocks were scored
    mamba_heads.{layer}     [mamba_num_heads * mamba_head_dim]  channels of each head of a Mamba
                     sub-layer, head after head; a head's score is the L2 norm of those that stay
    mamba_channels.{layer}  [mamba_head_dim]                    the same channel of all its heads
    attention, mlp, moe, mamba   [attention_layers] ...   sub-layers of each kind: of a GPTModel
                     only where they were scored, of a HybridModel instead of layers

In the names above, {layer} of a HybridModel is the number of the MLP among its MLPs, or of the
attention.

The file is safetensors; its metadata tell how the scores were made and for which sizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from megatron_ext.arch import Arch
from megatron_ext.arch.axes import axes_of
from megatron_ext.arch.rows import layer_of

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "minitron-scores-1"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one model and how they were made."""

    vectors: "Mapping[str, Tensor]"
    """Name to float32 vector, as in the module's table."""
    source: Arch
    """The model that was scored."""
    aggregation: str
    """Aggregation of token scores to one score, e.g. ``batch=l2,seq=mean``."""
    samples: int
    """Calibration samples."""
    seq_length: int
    """Tokens per sample."""
    depth: str = "block"
    """Method by which layers were scored, see ``depth_method``. (Single layers beside blocks of
    several, or beside sub-layers: by block importance.)"""
    removal_order: tuple[tuple[int, ...], ...] = ()
    """Layers to remove together, the first to go first; empty: one by one, by their scores."""


def depth_method(importance: str, block: int, *, rescore: bool, sublayers: bool = False) -> str:
    """Return how layers are scored in words: ``kl, blocks of 2, rescored``."""
    how = importance + f", blocks of {block}" * (block > 1) + ", rescored" * rescore
    return how + ", sub-layers" * sublayers


def lengths(arch: Arch, *, sublayers: bool = False) -> dict[str, int]:
    """Return the name and length of every score vector of ``arch``, if asked of sub-layers too."""
    units: dict[str, range] = {}
    found = {}
    for axis in axes_of(arch):
        for name in axis.vectors(units):
            units[name] = range(axis.length(arch, layer_of(name)))
            found[name] = axis.num_scores(arch, layer_of(name))
    kinds = {kind: len(arch.layers_of(kind)) for kind in arch.kinds} if sublayers else {}
    return found | kinds


def arch_from_json(values: Any) -> Arch:
    """Return the ``Arch`` whose ``asdict`` was written as JSON.

    Raises ``ValueError`` or ``TypeError`` on an unknown name or a value of another type.
    """
    if not isinstance(values, dict):
        raise TypeError(f"sizes of a model are a JSON object, not {type(values).__name__}")
    types: dict[str, Any] = {field.name: field.type for field in fields(Arch)}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"unknown size {name!r}")
        expected = types[name] | int if types[name] in (float, float | None) else types[name]
        if name != "by_layer" and not isinstance(value, expected):
            raise TypeError(f"{name} is {value!r}, expected a value of {types[name]}")
    return Arch(**values)
