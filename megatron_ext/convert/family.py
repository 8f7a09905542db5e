"""A family of Hugging Face models: all that its models have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.convert.rows import Row


@dataclass(frozen=True, kw_only=True)
class Family:
    """One ``model_type``: all that its models have in common."""

    model_type: str
    architecture: str
    """transformers' class of language models."""
    rows: Mapping[str, Row]
    """By the weight's name in a Megatron checkpoint."""
    sizes: Mapping[str, tuple[str, ...]]
    """Field of ``Arch``: its keys in config.json, the first one present is read, all are written.
    A field may be left out that follows from others."""
    activation: tuple[str, Mapping[str, Mapping[str, bool]]]
    """Key in config.json, and for each value that is computed here the fields of ``Arch``."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``Arch`` that every model of the family has."""
    biases: tuple[str, ...] = ()
    """Switches in config.json, any of which is add_bias_linear; biases that are off are zero."""
    negated: Mapping[str, str] = field(default_factory=dict)
    """Field of ``Arch``: the switch in config.json that says the opposite."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Key in config.json: the one value that is computed here."""
    at_most: Mapping[str, float] = field(default_factory=dict)
    """Key in config.json: the largest value that is computed here."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of the keys that a config.json leaves out."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Keys of every config.json that is written, whatever its origin says."""
    prefix: str = "model."
    """Prefix of the tensors' names; files of the bare model leave it out."""
    ignored: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)
    """Tensors (regular expressions) that files may hold and that are no weights."""
    left_out: tuple[str, ...] = ()
    """Weights (regular expressions) of other heads, which an import leaves out with a warning."""
    old_names: Mapping[str, str] = field(default_factory=dict)
    """End of a tensor's name: what old files have there."""
    windows: str = ""
    """Layers that transformers cuts to sliding_window: "all", "layers" as layer_types says; none.
    """
    no_rope_layers: bool = False
    """no_rope_layers says in which layers channels rotate."""
    default_rope: Mapping[str, Any] = field(default_factory=dict)
    """rope_parameters of a config.json without any."""
    gemma: bool = False
    """See ``gemma.py``."""
    scales_queries: bool = False
    """From original_max_position_embeddings on, transformers scales queries by their position."""
    rope_types: tuple[str, ...] = ("linear", "llama3", "yarn")
    """What transformers computes of rope_type, beside "default"."""
    partial_rotary: bool = False
    """transformers reads partial_rotary_factor; of other families it computes all channels."""
    served_apart: str = ""
    """An engine that computes head_dim as hidden_size // heads whatever config.json says."""
    has_pattern: bool = False
    """Its layers are sub-layers, which config.json lists: models are HybridModels."""
    whole_heads: bool = False
    """transformers refuses to load a hidden size that is no multiple of the heads; of Llama from
    5.0 on."""
