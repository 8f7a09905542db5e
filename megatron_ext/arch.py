"""The sizes of a model and the one table of its weights.

Trimming, parameter counts, FLOPs, initialisation and shape checks read the same table: a new weight
is a new row, and a weight without a row is an error that names it.

Named dims (a row of the table lists one per tensor axis):
    hidden    hidden_size                                  channels of the residual stream
    ffn       ffn_hidden_size                              input of the MLP's second matrix
    fc1       ffn, or with a gated MLP [gate ; up]         output of the MLP's first matrix
    heads     num_attention_heads * kv_channels            concatenated head outputs
    qkv       per query group: its query heads, key, value (all of kv_channels rows)
    head_dim  kv_channels
    vocab     padded_vocab_size
    position  max_position_embeddings
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

LAYER_PREFIX = "decoder.layers."

# Sizes that Megatron-LM 0.16 saves under the names of megatron-core's configuration.
RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}


@dataclass(frozen=True, kw_only=True)
class Arch:
    """The architecture of one model, in the names that Megatron-LM saves in a checkpoint's args."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads; equal to num_attention_heads without grouped queries."""
    kv_channels: int
    """Channels of one head; not tied to hidden_size / num_attention_heads."""
    max_position_embeddings: int
    vocab_size: int
    """Tokens the tokenizer knows."""
    padded_vocab_size: int
    """Rows of the embedding; the rows from vocab_size on stand for no token."""
    position_embedding_type: str = "learned_absolute"
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    use_rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    normalization: str = "LayerNorm"
    norm_epsilon: float = 1e-5
    apply_layernorm_1p: bool = False
    """Norm weights are stored as gamma - 1."""
    swiglu: bool = False
    squared_relu: bool = False
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    """A bias on linear_qkv even where add_bias_linear is off."""
    qk_layernorm: bool = False
    untie_embeddings_and_output_weights: bool = False
    init_method_std: float = 0.02
    attention_dropout: float = 0.1
    hidden_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be >= 1: {getattr(self, name)}.")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"--num-attention-heads {self.num_attention_heads} is not a multiple of "
                f"--num-query-groups {self.num_query_groups}."
            )
        if self.vocab_size > self.padded_vocab_size:
            raise ValueError(
                f"vocabulary {self.vocab_size} is larger than its padding {self.padded_vocab_size}."
            )

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "Arch":
        """Read an architecture from Megatron-LM's saved args (a mapping of names to values).

        Raises ``KeyError`` with the name of a size that is missing.
        """
        args = {**{name: args.get(new) for name, new in RENAMED.items()}, **args}
        known = {f.name: args[f.name] for f in fields(cls) if args.get(f.name) is not None}
        known.setdefault("vocab_size", args["padded_vocab_size"])
        if not args.get("group_query_attention"):
            known["num_query_groups"] = args["num_attention_heads"]
        missing = [name for name in _SIZES if name not in known]
        if missing:
            raise KeyError(missing[0])
        return cls(**known)

    def to_args(self) -> dict[str, Any]:
        """Return the inverse of ``from_args``: the names that Megatron-LM reads back."""
        sizes = asdict(self)
        return sizes | {
            **{new: sizes[name] for name, new in RENAMED.items()},
            "group_query_attention": self.num_query_groups != self.num_attention_heads,
            "add_position_embedding": self.position_embedding_type == "learned_absolute",
        }


_SIZES = tuple(f.name for f in fields(Arch) if f.type in (int, "int") and f.name != "rotary_base")


@dataclass(frozen=True)
class Weight:
    """One row of the table: a weight as it stands in a checkpoint."""

    key: str
    """Name of the tensor; a weight of every layer begins with ``decoder.layers.``."""
    dims: tuple[str, ...]
    init: str = "normal"
    """normal: std; scaled: std / sqrt(2 num_layers); ones and zeros (a norm's gamma, a bias)."""

    @property
    def per_layer(self) -> bool:
        """Whether each layer has one."""
        return self.key.startswith(LAYER_PREFIX)


def dim_sizes(arch: Arch) -> dict[str, int]:
    """Return the length of every named dim."""
    return {
        "hidden": arch.hidden_size,
        "ffn": arch.ffn_hidden_size,
        "fc1": arch.ffn_hidden_size * (2 if arch.swiglu else 1),
        "heads": arch.num_attention_heads * arch.kv_channels,
        "qkv": (arch.num_attention_heads + 2 * arch.num_query_groups) * arch.kv_channels,
        "head_dim": arch.kv_channels,
        "vocab": arch.padded_vocab_size,
        "position": arch.max_position_embeddings,
    }


def weights(arch: Arch) -> list[Weight]:
    """Return the table of ``arch``, in the order of the forward pass.

    Names are those on disk: Transformer Engine's, with each norm inside the linear layer that
    follows it, which megatron-core writes for its local layers too.
    """
    layer, norm_init = LAYER_PREFIX, "zeros" if arch.apply_layernorm_1p else "ones"

    def linear(key: str, dims: tuple[str, str], *, bias: bool, init: str) -> list[Weight]:
        rows = [Weight(f"{key}.weight", dims, init)]
        return rows + [Weight(f"{key}.bias", dims[:1], "zeros")] * bias

    def norm(key: str, dim: str = "hidden") -> list[Weight]:
        rows = [Weight(f"{key}weight", (dim,), norm_init)]
        return rows + [Weight(f"{key}bias", (dim,), "zeros")] * (arch.normalization == "LayerNorm")

    attention, mlp, bias = f"{layer}self_attention.", f"{layer}mlp.", arch.add_bias_linear
    qkv_bias = bias or arch.add_qkv_bias
    rows = [Weight("embedding.word_embeddings.weight", ("vocab", "hidden"))]
    if arch.position_embedding_type == "learned_absolute":
        rows += [Weight("embedding.position_embeddings.weight", ("position", "hidden"))]
    rows += norm(f"{attention}linear_qkv.layer_norm_")
    rows += linear(f"{attention}linear_qkv", ("qkv", "hidden"), bias=qkv_bias, init="normal")
    if arch.qk_layernorm:
        rows += norm(f"{attention}q_layernorm.", "head_dim")
        rows += norm(f"{attention}k_layernorm.", "head_dim")
    rows += linear(f"{attention}linear_proj", ("hidden", "heads"), bias=bias, init="scaled")
    rows += norm(f"{mlp}linear_fc1.layer_norm_")
    rows += linear(f"{mlp}linear_fc1", ("fc1", "hidden"), bias=bias, init="normal")
    rows += linear(f"{mlp}linear_fc2", ("hidden", "ffn"), bias=bias, init="scaled")
    rows += norm("decoder.final_layernorm.")
    if arch.untie_embeddings_and_output_weights:
        rows += [Weight("output_layer.weight", ("vocab", "hidden"))]
    return rows


def shape(weight: Weight, arch: Arch) -> tuple[int, ...]:
    """Return the shape of ``weight`` in one layer."""
    sizes = dim_sizes(arch)
    return tuple(sizes[dim] for dim in weight.dims)


def num_parameters(arch: Arch, *, embeddings: bool = True) -> int:
    """Count parameters; without ``embeddings``, leave out the vocabulary and position tables."""
    sizes, total = dim_sizes(arch), 0
    for weight in weights(arch):
        if not embeddings and weight.dims[0] in ("vocab", "position"):
            continue
        numel = 1
        for dim in weight.dims:
            numel *= sizes[dim]
        total += numel * (arch.num_layers if weight.per_layer else 1)
    return total


def forward_flops(arch: Arch, seq_length: int) -> int:
    """Return the floating-point operations of one token's forward pass, at 2 per multiply-add.

    Matrix multiplies only. Causal attention counts half of the square, seq_length / 2 keys a token
    on average. A training step costs three times as much (backward is two forwards).
    """
    sizes = dim_sizes(arch)
    matrices = [w for w in weights(arch) if len(w.dims) == 2 and w.per_layer]
    per_layer = sum(sizes[w.dims[0]] * sizes[w.dims[1]] for w in matrices)
    attention = sizes["heads"] * seq_length  # scores and values: 2 * heads * seq_length / 2
    output = sizes["vocab"] * sizes["hidden"]
    return 2 * (arch.num_layers * (per_layer + attention) + output)
