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
    tokentype num_tokentypes
    experts   num_experts                                  in a mixture of experts, every layer one
    moe_ffn, moe_fc1        as ffn and fc1, of one expert
    shared_ffn, shared_fc1  as ffn and fc1, of the shared experts together
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from math import prod
from typing import Any

from megatron_ext.arch import pattern as patterns

# Of a weight of every layer; the second in a BertModel.
LAYER_PREFIXES = ("decoder.layers.", "encoder.layers.")

# Sizes that Megatron-LM 0.16 saves under the names of megatron-core's configuration.
RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}
# Load-balancing losses: over a micro-batch, over each sample, none. megatron-core's third, over the
# global batch, depends on the order of micro-batches and so on the layout.
LOAD_BALANCING = ("aux_loss", "seq_aux_loss", "none")
# What saved args may say of experts beside the fields below: name, the only value taken.
ONLY = {
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_topk_scaling_factor": None,
    "moe_shared_expert_gate": False,
    "moe_expert_capacity_factor": None,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_router_force_biased": None,
    "moe_mlp_glu_interleave_size": None,
    "moe_shared_expert_glu_interleave_size": None,
}
# What else is not built here and what leaves it out, beside None. Most of it has no tensor of its
# own: a model without it would load and compute something else.
LEFT_OUT: dict[str, tuple[Any, ...]] = {
    "activation_func_clamp_value": (),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (),
    "glu_linear_offset": (0.0,),
    "heterogeneous_block_specs": (False,),
    "heterogeneous_layers_config_path": (),
    "high_freq_factor": (4.0,),
    "hybrid_override_pattern": (),
    "is_hybrid_model": (False,),
    "linear_attention_freq": (),
    "low_freq_factor": (1.0,),
    "mtp_num_layers": (0,),
    "multi_latent_attention": (False,),
    "no_rope_freq": (),
    "old_context_len": (8192,),
    "position_embedding_type": ("learned_absolute", "rope", "none"),
    "qk_l2_norm": (False,),
    "quick_geglu": (False,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (),
    "seq_len_interpolation_factor": (),
    "softmax_scale": (),
    "softmax_type": ("vanilla",),
    "use_mup": (False,),
    "window_size": (),
}


@dataclass(frozen=True, kw_only=True)
class Arch:
    """The architecture of one model, in the names that Megatron-LM saves in a checkpoint's args."""

    num_layers: int
    """With a hybrid_layer_pattern, megatron-core counts each sub-layer as a layer."""
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
    bias_gelu_fusion: bool = False
    """GELU in its tanh approximation, as Megatron-LM's fused kernel has it; needs biases."""
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    """A bias on linear_qkv even where add_bias_linear is off."""
    qk_layernorm: bool = False
    untie_embeddings_and_output_weights: bool = False
    bert_binary_head: bool = True
    """False: a BertModel without its next-sentence head, Megatron-LM's --bert-no-binary-head. Of a
    GPTModel, Megatron-LM saves True."""
    num_tokentypes: int = 0
    """Kinds of segment that a BertModel tells apart; 0 for none."""
    apply_residual_connection_post_layernorm: bool = False
    """Post-norm, of a BertModel only: a layer adds to the output of its norm, not to the input."""
    num_experts: int | None = None
    """Experts of every layer's MLP; None for a plain MLP, without any of the moe_ sizes."""
    moe_router_topk: int = 2
    """Experts that compute a token."""
    moe_ffn_hidden_size: int | None = None
    """Neurons of one expert."""
    moe_shared_expert_intermediate_size: int | None = None
    """Neurons of the shared experts together, which compute every token; None for none."""
    moe_router_pre_softmax: bool = False
    """Softmax over all experts, instead of over the chosen ones."""
    moe_router_load_balancing_type: str = "aux_loss"
    """Over what the loss that evens out the experts' load is taken: one of LOAD_BALANCING."""
    moe_aux_loss_coeff: float = 0.0
    """Weight of that loss in training."""
    hybrid_layer_pattern: str | None = None
    """The symbol of each sub-layer of a HybridModel (``pattern``); None for a GPTModel, whose
    layers are all whole."""
    init_method_std: float = 0.02
    attention_dropout: float = 0.1
    hidden_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in (*_SIZES, *_EXPERT_SIZES):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be >= 1: {value}.")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"--num-attention-heads {self.num_attention_heads} is not a multiple of "
                f"--num-query-groups {self.num_query_groups}."
            )
        if self.vocab_size > self.padded_vocab_size:
            raise ValueError(
                f"vocabulary {self.vocab_size} is larger than its padding {self.padded_vocab_size}."
            )
        for problem in (
            *self._pattern_problems(),
            *self._expert_problems(),
            *self._bert_problems(),
        ):
            raise ValueError(problem)

    @property
    def is_hybrid(self) -> bool:
        """Whether it is a HybridModel, whose layers are sub-layers."""
        return self.hybrid_layer_pattern is not None

    @property
    def pattern(self) -> str:
        """The symbol of each sub-layer, first to last."""
        whole = patterns.whole_layers(self.num_layers, experts=self.num_experts is not None)
        return self.hybrid_layer_pattern or whole

    @property
    def attention_layers(self) -> int:
        """Number of attention sub-layers."""
        return len(self.layers_of("attention"))

    @property
    def mlp_layers(self) -> int:
        """Number of MLP sub-layers."""
        return len(self.layers_of("mlp"))

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """Return the layer of each sub-layer of a kind, as megatron-core numbers layers from 0.

        Kinds are those of ``pattern.KINDS``.
        """
        if self.hybrid_layer_pattern is None:
            return tuple(range(self.num_layers))
        return patterns.positions(self.hybrid_layer_pattern, kind)

    def with_pattern(self, pattern: str) -> "Arch":
        """Return the model with these sub-layers: a GPTModel, if they are whole layers."""
        num_layers = len(pattern) // 2
        if pattern == patterns.whole_layers(num_layers):
            return replace(self, num_layers=num_layers, hybrid_layer_pattern=None)
        return replace(self, num_layers=len(pattern), hybrid_layer_pattern=pattern)

    def by_sublayers(self) -> "Arch":
        """Return the same model as a HybridModel."""
        return replace(self, num_layers=len(self.pattern), hybrid_layer_pattern=self.pattern)

    def _pattern_problems(self) -> Iterator[str]:
        if self.hybrid_layer_pattern is None:
            return
        if self.is_bert or self.num_experts is not None:
            flag = "--bert-no-binary-head" if self.is_bert else "--num-experts"
            yield f"--hybrid-layer-pattern does not go with {flag}."
        yield from patterns.problems(self.hybrid_layer_pattern)
        if len(self.hybrid_layer_pattern) != self.num_layers:
            yield (
                f"hybrid_layer_pattern {self.hybrid_layer_pattern} has "
                f"{len(self.hybrid_layer_pattern)} sub-layers, num_layers is {self.num_layers}."
            )

    @property
    def is_bert(self) -> bool:
        """Whether it is a BertModel: a masked language model, whose tokens see both sides."""
        return not self.bert_binary_head

    def _bert_problems(self) -> Iterator[str]:
        if not self.is_bert:
            if self.num_tokentypes:
                yield f"num_tokentypes {self.num_tokentypes} needs --bert-no-binary-head."
            if self.apply_residual_connection_post_layernorm:
                yield "--apply-residual-connection-post-layernorm needs --bert-no-binary-head."
            return
        if self.num_experts is not None:
            yield "--bert-no-binary-head does not go with --num-experts."
        if self.position_embedding_type != "learned_absolute":
            yield (
                "--bert-no-binary-head needs --position-embedding-type learned_absolute, not "
                f"{self.position_embedding_type}."
            )

    def _expert_problems(self) -> Iterator[str]:
        experts, topk = self.num_experts, self.moe_router_topk
        if experts is None:
            for f in fields(self):
                if f.name.startswith("moe_") and getattr(self, f.name) != f.default:
                    yield f"--{f.name.replace('_', '-')} needs --num-experts."
            return
        if self.moe_ffn_hidden_size is None:
            yield "--num-experts needs --moe-ffn-hidden-size."
        if self.moe_router_load_balancing_type not in LOAD_BALANCING:
            yield (
                f"--moe-router-load-balancing-type {self.moe_router_load_balancing_type}: only "
                f"{', '.join(LOAD_BALANCING)}."
            )
        if topk > experts:
            yield f"--moe-router-topk {topk} is more than --num-experts {experts}."
        if topk == 1 and not self.moe_router_pre_softmax:
            yield "--moe-router-topk 1 needs --moe-router-pre-softmax: one score alone is always 1."
        if self.add_bias_linear:
            yield "--num-experts needs --disable-bias-linear: experts have no biases here."

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "Arch":
        """Read an architecture from Megatron-LM's saved args (a mapping of names to values).

        Raises ``KeyError`` with the name of a size that is missing, ``ValueError`` for sizes that
        contradict each other and for what is not built here.
        """
        check_left_out(args)
        args = {**{name: args.get(new) for name, new in RENAMED.items()}, **args}
        known = {f.name: args[f.name] for f in fields(cls) if args.get(f.name) is not None}
        known.setdefault("vocab_size", args["padded_vocab_size"])
        if not is_gelu(known) or not known.get("add_bias_linear", True):
            known.pop("bias_gelu_fusion", None)  # on by default in Megatron-LM, without effect
        if args.get("num_experts") is None:
            known = {name: value for name, value in known.items() if not name.startswith("moe_")}
        else:
            known |= _expert_args(args)
        if known.get("bert_binary_head", True):
            # megatron-core 0.19.2 parses it and computes a pre-norm GPTModel all the same.
            known.pop("apply_residual_connection_post_layernorm", None)
        if pattern := known.get("hybrid_layer_pattern"):
            # Where pipeline stages ended when it was saved is no part of the model.
            known["hybrid_layer_pattern"] = pattern.replace(patterns.STAGE, "")
            known["num_layers"] = len(known["hybrid_layer_pattern"])
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
            "is_hybrid_model": self.is_hybrid,
        }


_SIZES = tuple(f.name for f in fields(Arch) if f.type in (int, "int") and f.default is MISSING)
_EXPERT_SIZES = (
    "num_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
)


def check_left_out(settings: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if saved args or a configuration ask for what is not built here."""
    for name, allowed in LEFT_OUT.items():
        value = settings.get(name)
        if name == "is_hybrid_model" and settings.get("hybrid_layer_pattern"):
            continue
        if value is not None and value not in allowed:
            raise ValueError(f"{name} is {value}, which is not computed here")


def is_gelu(sizes: Mapping[str, Any]) -> bool:
    """Whether the MLP that ``sizes`` (fields of ``Arch`` by name) describe computes a GELU."""
    return not (sizes.get("swiglu") or sizes.get("squared_relu"))


def _expert_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the experts' sizes that saved args write in a way of their own."""
    for name, only in ONLY.items():
        value = args.get(name)
        values = value if isinstance(value, list) else [value]
        if any(value not in (None, only) for value in values):
            raise ValueError(f"{name} is {value}; only {only} is supported")
    known = {"moe_ffn_hidden_size": args.get("moe_ffn_hidden_size") or args["ffn_hidden_size"]}
    # Megatron-LM takes several losses at once: a list, even of one.
    for name in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"):
        if isinstance(value := args.get(name), list):
            if len(value) > 1:
                raise ValueError(f"{name} is {value}; only one loss is supported")
            known[name] = value[0]
    return known


@dataclass(frozen=True)
class Weight:
    """One row of the table: a weight as it stands in a checkpoint."""

    key: str
    """Name of the tensor; a weight of every layer begins with one of ``LAYER_PREFIXES``."""
    dims: tuple[str, ...]
    init: str = "normal"
    """normal: std; scaled: std / sqrt(sub-layers); ones and zeros (a norm's gamma, a bias)."""

    @property
    def per_layer(self) -> bool:
        """Whether each layer has one, or each sub-layer of its kind."""
        return self.key.startswith(LAYER_PREFIXES)

    @property
    def kind(self) -> str | None:
        """The kind of sub-layer that has one (``pattern.KINDS``); None outside the layers."""
        if not self.per_layer:
            return None
        return "attention" if ".self_attention." in self.key else "mlp"


def dim_sizes(arch: Arch) -> dict[str, int]:
    """Return the length of every named dim."""
    moe_ffn, shared_ffn = arch.moe_ffn_hidden_size, arch.moe_shared_expert_intermediate_size
    gates = 2 if arch.swiglu else 1
    experts = {"experts": arch.num_experts, "moe_ffn": moe_ffn, "moe_fc1": (moe_ffn or 0) * gates}
    shared = {"shared_ffn": shared_ffn, "shared_fc1": (shared_ffn or 0) * gates}
    return {
        "hidden": arch.hidden_size,
        "ffn": arch.ffn_hidden_size,
        "fc1": arch.ffn_hidden_size * gates,
        "heads": arch.num_attention_heads * arch.kv_channels,
        "qkv": (arch.num_attention_heads + 2 * arch.num_query_groups) * arch.kv_channels,
        "head_dim": arch.kv_channels,
        "vocab": arch.padded_vocab_size,
        "position": arch.max_position_embeddings,
        **(experts if arch.num_experts else {}),
        **(shared if shared_ffn else {}),
        **({"tokentype": arch.num_tokentypes} if arch.num_tokentypes else {}),
    }


def weights(arch: Arch) -> list[Weight]:
    """Return the table of ``arch``, in the order of the forward pass.

    Names are those on disk: Transformer Engine's, with each norm inside the linear layer that
    follows it, which megatron-core writes for its local layers too. The norm before a router stands
    alone. A weight of the experts is one tensor: [experts, ...]. A GPTModel's checkpoint stacks the
    layers, a HybridModel's puts the number of the sub-layer behind ``layers.``: ``names_on_disk``.
    """
    layer, norm_init = LAYER_PREFIXES[arch.is_bert], "zeros" if arch.apply_layernorm_1p else "ones"

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
    if arch.num_tokentypes:
        rows += [Weight("embedding.tokentype_embeddings.weight", ("tokentype", "hidden"))]
    if arch.attention_layers:
        rows += norm(f"{attention}linear_qkv.layer_norm_")
        rows += linear(f"{attention}linear_qkv", ("qkv", "hidden"), bias=qkv_bias, init="normal")
        if arch.qk_layernorm:
            rows += norm(f"{attention}q_layernorm.", "head_dim")
            rows += norm(f"{attention}k_layernorm.", "head_dim")
        rows += linear(f"{attention}linear_proj", ("hidden", "heads"), bias=bias, init="scaled")
    if arch.mlp_layers and arch.num_experts is None:
        rows += norm(f"{mlp}linear_fc1.layer_norm_")
        rows += linear(f"{mlp}linear_fc1", ("fc1", "hidden"), bias=bias, init="normal")
        rows += linear(f"{mlp}linear_fc2", ("hidden", "ffn"), bias=bias, init="scaled")
    elif arch.mlp_layers:
        rows += norm(f"{layer}pre_mlp_layernorm.")
        rows += _expert_weights(mlp, shared=arch.moe_shared_expert_intermediate_size is not None)
    final_norm = "final_norm" if arch.is_hybrid else "final_layernorm"
    rows += norm(f"{layer.removesuffix('layers.')}{final_norm}.")
    if arch.is_bert:
        rows += linear("lm_head.dense", ("hidden", "hidden"), bias=True, init="normal")
        rows += norm("lm_head.layer_norm.")
    if arch.untie_embeddings_and_output_weights:
        rows += [Weight("output_layer.weight", ("vocab", "hidden"))]
    if arch.is_bert:
        rows += [Weight("output_layer.bias", ("vocab",), "zeros")]
    return rows


def _expert_weights(mlp: str, *, shared: bool) -> list[Weight]:
    rows = [
        Weight(f"{mlp}router.weight", ("experts", "hidden")),
        Weight(f"{mlp}experts.experts.linear_fc1.weight", ("experts", "moe_fc1", "hidden")),
        Weight(
            f"{mlp}experts.experts.linear_fc2.weight", ("experts", "hidden", "moe_ffn"), "scaled"
        ),
    ]
    if shared:
        rows += [
            Weight(f"{mlp}shared_experts.linear_fc1.weight", ("shared_fc1", "hidden")),
            Weight(f"{mlp}shared_experts.linear_fc2.weight", ("hidden", "shared_ffn"), "scaled"),
        ]
    return rows


def layer_key(key: str, layer: int) -> str:
    """Return a layer's name in the per-layer style: ``decoder.layers.3.mlp...``."""
    prefix = next(prefix for prefix in LAYER_PREFIXES if key.startswith(prefix))
    return f"{prefix}{layer}.{key.removeprefix(prefix)}"


def count(weight: Weight, arch: Arch) -> int:
    """Return how many layers have ``weight``; 1 for one outside the layers."""
    return 1 if weight.kind is None else len(arch.layers_of(weight.kind))


def names_on_disk(weight: Weight, arch: Arch) -> list[str]:
    """Return the names of the tensors in a checkpoint that hold ``weight``.

    One, with all layers stacked; of a HybridModel one for each sub-layer, as ``arch.layers_of``.
    """
    if weight.kind is None or not arch.is_hybrid:
        return [weight.key]
    return [layer_key(weight.key, layer) for layer in arch.layers_of(weight.kind)]


def shape(weight: Weight, arch: Arch) -> tuple[int, ...]:
    """Return the shape of ``weight`` in one layer."""
    sizes = dim_sizes(arch)
    return tuple(sizes[dim] for dim in weight.dims)


def is_of_experts(weight: Weight) -> bool:
    """Whether ``weight`` holds a matrix of each expert; the router's holds a row of each."""
    return weight.dims[0] == "experts" and len(weight.dims) == 3


def num_parameters(arch: Arch, *, embeddings: bool = True, active: bool = False) -> int:
    """Count parameters.

    Args:
        arch: the sizes.
        embeddings: without, leave out the tables of vocabulary, positions and segments.
        active: count only what computes one token: of the experts, moe_router_topk.
    """
    total = 0
    for weight in weights(arch):
        if embeddings or weight.dims[0] not in ("vocab", "position", "tokentype"):
            total += _numel(weight, arch, active=active) * count(weight, arch)
    return total


def forward_flops(arch: Arch, seq_length: int) -> int:
    """Return the floating-point operations of one token's forward pass, at 2 per multiply-add.

    Matrix multiplies only, of the experts those that compute a token. Causal attention counts half
    of the square, seq_length / 2 keys a token on average, a BertModel's all of it. A training step
    costs three times as much (backward is two forwards).
    """
    sizes = dim_sizes(arch)
    matrices = [w for w in weights(arch) if len(w.dims) > 1 and w.per_layer]
    layers = sum(_numel(w, arch, active=True) * count(w, arch) for w in matrices)
    # Scores and values: 2 * heads * seq_length / 2.
    attention = arch.attention_layers * sizes["heads"] * seq_length * (1 + arch.is_bert)
    output = sizes["vocab"] * sizes["hidden"] + arch.is_bert * sizes["hidden"] ** 2
    return 2 * (layers + attention + output)


def _numel(weight: Weight, arch: Arch, *, active: bool) -> int:
    """Return the elements of ``weight`` in one layer, or of its active experts."""
    numel = prod(shape(weight, arch))
    if active and is_of_experts(weight):
        return numel // arch.num_experts * arch.moe_router_topk
    return numel
