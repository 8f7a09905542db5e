"""The sizes of a model, from and to the args that Megatron-LM saves."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import lru_cache
from itertools import chain
from typing import Any

from megatron_ext.arch import attention, bert, mamba, mlp, moe, per_layer, rotary, scales
from megatron_ext.arch import pattern as patterns
from megatron_ext.arch.kinds import MODULES
from megatron_ext.arch.mlp import is_gelu
from megatron_ext.arch.rows import REQUIRED, size
from megatron_ext.arch.unsupported import check_supported, pattern_of

# Sizes by Megatron-LM's name, and megatron-core's, under which some versions save them too.
MCORE_NAMES = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}
# Upper limits. The table of weights has a row per layer and expert: a corrupt count would take
# all memory before any tensor is read.
MOST = {"num_layers": 100_000, "num_experts": 100_000}
# Sizes in which the sub-layers of a kind may differ, and the kind.
BY_LAYER = {
    size.name: kind.NAME
    for kind in MODULES
    for axis in kind.AXES
    for size in axis.sizes
    if size.by_layer
}


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes of the whole model; each is a field of ``Arch``."""

    num_layers: int = size(REQUIRED, "transformer layers", typed=None, at_least=1)
    """With a hybrid_layer_pattern, megatron-core counts each sub-layer as a layer."""
    hybrid_layer_pattern: str | None = size(
        None,
        "in place of num-layers: sub-layers, * attention, - MLP, E experts, M Mamba, as "
        "'M-M*-', each a layer of a HybridModel; pipeline stages are cut by "
        "--pipeline-model-parallel-layout, a t for each",
    )
    """None for a GPTModel, whose layers are all whole."""
    hidden_size: int = size(REQUIRED, "channels of the residual stream", typed=None, at_least=1)
    max_position_embeddings: int = size(
        REQUIRED, "longest sequence, in tokens", typed=None, at_least=1
    )
    vocab_size: int
    """Tokens the tokenizer knows."""
    padded_vocab_size: int = size(
        REQUIRED,
        "rows of a new vocabulary; default by --make-vocab-size-divisible-by",
        typed=None,
        at_least=1,
    )
    """Rows of the embedding; the rows from vocab_size on stand for no token."""
    num_tokentypes: int = 0
    """Kinds of segment that a BertModel tells apart; 0 for none."""
    position_embedding_type: str = size(
        "learned_absolute",
        "how positions enter",
        choices=("learned_absolute", "rope", "yarn", "none"),
        shorthands={"--use-rotary-position-embeddings": "rope"},
    )
    normalization: str = size("LayerNorm", "kind of norm", choices=("LayerNorm", "RMSNorm"))
    norm_epsilon: float = size(1e-5, "added to the variance in norms", above=0)
    apply_layernorm_1p: bool = size(False, "norm weights are stored as gamma - 1")
    sandwich_norm: bool = False
    """Whether attention and MLP have a norm behind them too, before their output is added."""
    add_bias_linear: bool = size(True, "no bias in linear layers", off="--disable-bias-linear")
    untie_embeddings_and_output_weights: bool = size(
        False, "an output matrix of its own instead of the embedding's"
    )
    init_method_std: float = size(0.02, "standard deviation of a new model's weights", above=0)
    hidden_dropout: float = size(
        0.1, "share of layer outputs dropped in training", at_least=0, below=1
    )


# Bases from the last to the first: their fields are flags in this order.
@dataclass(frozen=True, kw_only=True)
class Arch(
    bert.Sizes,
    mamba.Sizes,
    moe.Sizes,
    mlp.Sizes,
    attention.Sizes,
    rotary.Sizes,
    scales.Sizes,
    ModelSizes,
):
    """The architecture of one model, in the names that Megatron-LM saves in a checkpoint's args."""

    by_layer: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Sizes in which sub-layers differ (``BY_LAYER``), each with one value for every sub-layer of
    its kind; the field of that name is the first one's. Only of a HybridModel, whose sub-layers
    have tensors of their own."""

    def __post_init__(self) -> None:
        # Equal models are equal: lists of JSON, sizes that do not differ.
        given = sorted((name, tuple(values)) for name, values in self.by_layer)
        differing = tuple(entry for entry in given if len(set(entry[1])) > 1)
        object.__setattr__(self, "by_layer", differing)
        for name, bound in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"--{name.replace('_', '-')} must be >= {bound}: {value}.")
            if value is not None and value > MOST.get(name, value):
                raise ValueError(f"--{name.replace('_', '-')} must be <= {MOST[name]}: {value}.")
        for problem in chain(self._by_layer_problems(given), self._problems()):
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        if self.vocab_size > self.padded_vocab_size:
            padded = self.padded_vocab_size
            yield f"vocabulary {self.vocab_size} is larger than its padding {padded}."
        if self.is_hybrid:
            if self.is_bert:
                yield "--hybrid-layer-pattern does not go with --bert-no-binary-head."
            yield from patterns.problems(
                self.pattern, self.num_layers, experts=self.num_experts is not None
            )
        if self.sandwich_norm and (self.is_bert or self.num_experts or self.add_bias_linear):
            yield "sandwich_norm goes with plain MLPs without biases, of no BertModel."
        for kind in MODULES:
            yield from kind.problems(self)
        yield from rotary.problems(self)
        yield from per_layer.problems(self)
        yield from scales.problems(self)
        yield from bert.problems(self)

    def _by_layer_problems(self, given: list[tuple[str, tuple[int, ...]]]) -> Iterator[str]:
        for name, values in given:
            if name not in BY_LAYER:
                yield f"by_layer: {name} cannot differ; only {', '.join(BY_LAYER)} can."
            elif len(values) != (count := len(self.layers_of(kind := BY_LAYER[name]))):
                yield f"by_layer: {name} has {len(values)} values for {count} {kind} sub-layers."
            elif getattr(self, name) != values[0]:
                yield f"by_layer: {name} begins with {values[0]}, {name} is {getattr(self, name)}."
        if self.by_layer and not self.is_hybrid:
            yield "by_layer: layers that differ need a hybrid_layer_pattern."
        for name, values in self.by_layer:
            for number in range(len(values)):
                self.at(BY_LAYER[name], number)  # is checked as a model of its own

    def values(self, name: str) -> tuple[int, ...]:
        """Return a size of each sub-layer of its kind; where all are alike, once."""
        return dict(self.by_layer).get(name, (getattr(self, name),))

    def span(self, name: str, form: str = "") -> str:
        """Return a size as text: 64, or 40-64 where sub-layers differ."""
        low, high = min(self.values(name)), max(self.values(name))
        return f"{low:{form}}" + f"-{high:{form}}" * (low < high)

    def at(self, kind: str | None, number: int | None) -> "Arch":
        """Return the same model with the sizes of one sub-layer everywhere; self if all are alike.

        Args:
            kind: of the sub-layer; None outside the layers.
            number: of the sub-layer within its kind.
        """
        if not any(BY_LAYER[name] == kind for name, _ in self.by_layer):
            return self
        return _at(self, kind, number)

    def alike(self, kind: str | None) -> Mapping["Arch", int]:
        """Return the model as ``at`` each sub-layer of a kind, and how many have these sizes."""
        count = 1 if kind is None else len(self.layers_of(kind))
        if self.at(kind, 0) is self:
            return {self: count}
        return Counter(self.at(kind, number) for number in range(count))

    def with_sizes(self, values: Mapping[str, Sequence[int]]) -> "Arch":
        """Return the model with sizes of ``BY_LAYER`` as ``values`` returns them.

        Sub-layers that differ make it a HybridModel.
        """
        by_layer = {**dict(self.by_layer), **values}
        differing = tuple((n, tuple(each)) for n, each in by_layer.items() if len(set(each)) > 1)
        arch = self.by_sublayers() if differing and not self.is_hybrid else self
        first: dict[str, Any] = {name: each[0] for name, each in values.items()}
        return replace(arch, by_layer=differing, **first)

    def part(self, layers: Sequence[int]) -> "Arch":
        """Return the HybridModel of some of its sub-layers, by their places in the pattern."""
        sizes = {}
        for name, values in self.by_layer:
            places = zip(values, self.layers_of(BY_LAYER[name]), strict=True)
            sizes[name] = [value for value, layer in places if layer in layers]
        pattern = "".join(self.pattern[layer] for layer in layers)
        arch = replace(self, by_layer=()).with_sublayers(pattern)
        return arch.with_sizes({name: each for name, each in sizes.items() if each})

    @property
    def is_hybrid(self) -> bool:
        """Whether it is a HybridModel, whose layers are sub-layers."""
        return self.hybrid_layer_pattern is not None

    @property
    def pattern(self) -> str:
        """The symbol of each sub-layer, first to last."""
        if self.hybrid_layer_pattern is not None:
            return self.hybrid_layer_pattern
        return patterns.whole_layers(self.num_layers, experts=self.num_experts is not None)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its sub-layers, in the order of ``kinds.MODULES``."""
        return patterns.kinds(self.pattern)

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """Return the layer of each sub-layer of a kind, as megatron-core numbers layers from 0."""
        if self.is_hybrid:
            return patterns.positions(self.pattern, kind)
        return tuple(range(self.num_layers)) if kind in self.kinds else ()

    @property
    def attention_layers(self) -> int:
        """Number of attention sub-layers."""
        return len(self.layers_of("attention"))

    @property
    def mlp_layers(self) -> int:
        """Number of sub-layers that are a plain MLP."""
        return len(self.layers_of("mlp"))

    @property
    def moe_layers(self) -> int:
        """Number of mixtures of experts."""
        return len(self.layers_of("moe"))

    @property
    def mamba_layers(self) -> int:
        """Number of Mamba sub-layers."""
        return len(self.layers_of("mamba"))

    def with_pattern(self, pattern: str) -> "Arch":
        """Return the model with these sub-layers: a GPTModel, if they are whole layers."""
        arch, num_layers = self.with_sublayers(pattern), len(pattern) // 2
        whole = patterns.whole_layers(num_layers, experts="moe" in arch.kinds)
        if pattern == whole and not arch.by_layer:
            return replace(arch, num_layers=num_layers, hybrid_layer_pattern=None)
        return arch

    def with_sublayers(self, pattern: str) -> "Arch":
        """Return the HybridModel with these sub-layers; a kind that lacks has no sizes."""
        lacking = [kind for kind in (moe, mamba) if kind.SYMBOL not in pattern]
        none: dict[str, Any] = {f.name: f.default for kind in lacking for f in fields(kind.Sizes)}
        return replace(self, num_layers=len(pattern), hybrid_layer_pattern=pattern, **none)

    def by_sublayers(self) -> "Arch":
        """Return the same model as a HybridModel."""
        return self.with_sublayers(self.pattern)

    @property
    def has_whole_layers(self) -> bool:
        """Whether its sub-layers are those of a GPTModel."""
        return not (self.is_hybrid and self.with_pattern(self.pattern).is_hybrid)

    def by_layers(self) -> "Arch":
        """Return the same model as a GPTModel.

        Raises:
            ValueError: a layer has no attention or no MLP, or layers differ in size.
        """
        if self.by_layer:
            raise ValueError(f"its layers differ in {', '.join(dict(self.by_layer))}.")
        if not self.has_whole_layers:
            raise ValueError(
                f"the sub-layers {self.pattern} are no whole layers, '*-' or '*E' each."
            )
        return self.with_pattern(self.pattern)

    def with_layers(self, layers: Sequence[int]) -> "Arch":
        """Return the GPTModel or BertModel of some of these layers, by number."""
        return replace(self, num_layers=len(layers), **per_layer.of_layers(self, layers))

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "Arch":
        """Read an architecture from Megatron-LM's saved args (a mapping of names to values).

        Raises ``KeyError`` with the name of a size that is missing, ``ValueError`` for sizes that
        contradict each other and for what is not built here.
        """
        check_supported(args)
        args = {**{name: args.get(other) for name, other in MCORE_NAMES.items()}, **args}
        # megatron-core before 0.17 has no other name for it.
        args["hybrid_layer_pattern"] = pattern_of(args)
        known = {f.name: args[f.name] for f in fields(cls) if args.get(f.name) is not None}
        known.setdefault("vocab_size", args["padded_vocab_size"])
        if not is_gelu(known) or not known.get("add_bias_linear", True):
            known.pop("bias_gelu_fusion", None)  # on by default in Megatron-LM, without effect
        if args.get("num_experts") is None:
            known = {name: value for name, value in known.items() if not name.startswith("moe_")}
        else:
            known |= moe.from_args(args)
        if known.get("bert_binary_head", True):
            # megatron-core 0.19.2 parses it and computes a pre-norm GPTModel all the same.
            known.pop("apply_residual_connection_post_layernorm", None)
        if pattern := known.get("hybrid_layer_pattern"):
            # Where pipeline stages ended when it was saved is no part of the model.
            known["hybrid_layer_pattern"] = pattern.replace(patterns.STAGE, "")
            known["num_layers"] = len(known["hybrid_layer_pattern"])
        known = {name: value for name, value in known.items() if not name.startswith("mamba_")}
        known |= mamba.completed(args)
        if not args.get("group_query_attention"):
            known["num_query_groups"] = args["num_attention_heads"]
        missing = [name for name in _SIZES if name not in known]
        if missing:
            raise KeyError(missing[0])
        if known.get("window_size") is None:  # then it is of no window
            known.pop("window_attn_skip_freq", None)
        return cls(**canonical(known, known["num_layers"]))

    def to_args(self) -> dict[str, Any]:
        """Return the inverse of ``from_args``: the names that Megatron-LM reads back."""
        sizes = asdict(self)
        return sizes | {
            **{other: sizes[name] for name, other in MCORE_NAMES.items()},
            "group_query_attention": self.num_query_groups != self.num_attention_heads,
            # Off by a deprecated flag of Megatron-LM, which compares the two before it loads and
            # takes the flag with rope only: nobody has to type it.
            "add_position_embedding": True,
            # Lists, as JSON has them: readers unpickle nothing else.
            "by_layer": [[name, list(values)] for name, values in self.by_layer],
            "is_hybrid_model": self.is_hybrid,
            "window_size": None if self.window is None else (self.window, 0),
            **{name: per_layer.switches(self, name) for name in per_layer.NAMES},
        }


@lru_cache(maxsize=4096)
def _at(arch: Arch, kind: str, number: int) -> Arch:
    own: dict[str, Any] = {n: each[number] for n, each in arch.by_layer if BY_LAYER[n] == kind}
    return replace(arch, by_layer=(), **own)


_SIZES = tuple(f.name for f in fields(Arch) if f.type in (int, "int") and f.default is MISSING)
_AT_LEAST = {"vocab_size": 1} | {
    f.name: f.metadata["flag"]["at_least"]
    for f in fields(Arch)
    if "at_least" in f.metadata.get("flag", ())
}


def canonical(sizes: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Return ``sizes`` with what Megatron-LM takes in several forms in that of ``Arch``.

    Raises ``ValueError`` for a list that does not fit the layers, and for windows to the right.
    """
    found = per_layer.expanded(sizes, num_layers)
    if found.get("window_size") is not None:
        found["window_size"] = attention.window_text(found["window_size"])
    return found
