"""The axes that pruning cuts: one row says all that is known of an axis.

Scores, plans, trimming, baselines, the search, --target- flags and what a layout must divide loop
over ``AXES`` and name no axis. A new axis is a row here and one of ``pruning.taps``: what of a
layer measures it.

A row says how units lie on the dims of the table of weights (``arch``): a dim is a list of
sections, one behind the other, each with the unit of every position. Two query groups of two heads,
2 kv_channels, and a gated MLP of 3 neurons:

    heads  [0 0 1 1 2 2 3 3]
    qkv    [0 0 1 1 4 4 4 4 2 2 3 3 5 5 5 5]     4 and 5 are the groups: their keys and values
    fc1    [0 1 2] [0 1 2]                       gate, up

A position stays if its unit stays. Sections stay in their order; within a section, positions come
in the order of the kept units.

Depth is cut in whole layers (``layers``) or in sub-layers (``attention``, ``mlp``): a GPTModel has
the first axis, a HybridModel the other two, and a GPTModel's sub-layers are those of the same
model as a HybridModel (``Arch.by_sublayers``). Units of a sub-layer go by its number within its
kind, which is the number of the layer where all layers are whole.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_ext.arch.sizes import Arch

Sections = Callable[[Arch], list[Sequence[int]]]


@dataclass(frozen=True, kw_only=True)
class Size:
    """A number of units, or of groups of them, that pruning changes."""

    name: str
    """Megatron's, an attribute of ``Arch``."""
    letter: str
    """In the name of a candidate of a search."""
    help: str
    """Text of its --target- flag's help: the thing that is counted."""
    rows: Callable[[Arch], int] | None = None
    """Rows of a matrix product that one of them is; None where no product grows with it."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Units of one kind."""

    name: str
    """In scores, plans and error messages."""
    size: Size
    """Number of units."""
    within: Size | None = None
    """Groups of neighbouring units; units are ranked within their group, and each group that stays
    keeps as many. What a group shares is unit ``size`` + group: it stays with any unit of it."""
    scope: Literal["model", "layer", "expert"] = "layer"
    """Owner of a set of units: the model, each layer, each expert of each layer."""
    kind: str | None = None
    """The kind of sub-layer that has the units (``pattern.KINDS``); None of the model's."""
    dims: Mapping[str, Sections]
    """On which dims the units lie, and how."""
    tp_split: bool = False
    """A tensor-parallel rank holds a share of the units, and of their groups."""
    exists: Callable[[Arch], bool] = lambda arch: True
    """Whether a model has such units."""

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes that pruning this axis changes."""
        return (self.size,) if self.within is None else (self.size, self.within)

    def length(self, arch: Arch) -> int:
        """Return how many units one vector of this axis has."""
        return getattr(arch, self.size.name)

    def vector(self, layer: int | None = None, expert: int | None = None) -> str:
        """Return the name of one vector: ``hidden``, ``ffn.3``, ``moe_ffn.3.7``."""
        numbers = {"model": (), "layer": (layer,), "expert": (layer, expert)}[self.scope]
        return ".".join(map(str, (self.name, *numbers)))

    def vectors(self, kept: Mapping[str, Sequence[int]]) -> Iterator[str]:
        """Yield the names of all vectors, for the layers and experts that ``kept`` has.

        ``kept`` holds vectors of the axes before this one, by name.
        """
        if self.scope == "model":
            yield self.vector()
            return
        for layer in kept_layers(kept, self.kind):
            if self.scope == "layer":
                yield self.vector(layer)
            else:
                yield from (self.vector(layer, expert) for expert in kept[f"experts.{layer}"])


def kept_layers(kept: Mapping[str, Sequence[int]], kind: str) -> Sequence[int]:
    """Return the sub-layers of a kind that ``kept`` has, numbers within the kind."""
    return kept["layers"] if "layers" in kept else kept[kind]


def one_row(arch: Arch) -> int:
    """Each is one row of a matrix product."""
    return 1


def one_each(size: str) -> Sections:
    """Position i belongs to unit i."""
    return lambda arch: [range(getattr(arch, size))]


def gate_and_up(size: str) -> Sections:
    """Output of an MLP's first matrix: [gate ; up] of each neuron, or one of the two."""
    return lambda arch: [range(getattr(arch, size))] * (2 if arch.swiglu else 1)


def head_outputs(arch: Arch) -> list[Sequence[int]]:
    """Concatenated head outputs: kv_channels positions of each head."""
    return [_repeated(range(arch.num_attention_heads), arch.kv_channels)]


def queries_keys_values(arch: Arch) -> list[Sequence[int]]:
    """Queries, key and value of one query group after another: kv_channels positions each.

    A key and value belong to the group, or to the head where every head has its own.
    """
    heads, groups = arch.num_attention_heads, arch.num_query_groups
    blocks: list[int] = []
    for group in range(groups):
        queries = range(group * heads // groups, (group + 1) * heads // groups)
        owner = heads + group if groups < heads else group
        blocks += [*queries, owner, owner]
    return [_repeated(blocks, arch.kv_channels)]


def _repeated(units: Iterable[int], times: int) -> list[int]:
    return [unit for unit in units for _ in range(times)]


def is_moe(arch: Arch) -> bool:
    """Whether layers have experts instead of one MLP."""
    return arch.num_experts is not None


def has_shared_experts(arch: Arch) -> bool:
    """Whether some experts compute every token."""
    return arch.moe_shared_expert_intermediate_size is not None


HEADS = Axis(
    name="heads",
    kind="attention",
    size=Size(
        name="num_attention_heads",
        letter="A",
        help="query heads, the same number of each query group",
        rows=lambda arch: arch.kv_channels,
    ),
    within=Size(
        name="num_query_groups",
        letter="G",
        help="key/value heads, removed as groups; keep a multiple of every TP size to be used",
        rows=lambda arch: 2 * arch.kv_channels,
    ),
    dims={"heads": head_outputs, "qkv": queries_keys_values},
    tp_split=True,
    exists=lambda arch: arch.attention_layers > 0,
)
# An axis within layers or experts comes behind theirs.
AXES = (
    Axis(
        name="layers",
        scope="model",
        size=Size(name="num_layers", letter="L", help="transformer layers"),
        dims={},
        exists=lambda arch: not arch.is_hybrid,
    ),
    Axis(
        name="attention",
        scope="model",
        size=Size(
            name="attention_layers", letter="LA", help="attention sub-layers, each removed alone"
        ),
        dims={},
        exists=lambda arch: arch.is_hybrid,
    ),
    Axis(
        name="mlp",
        scope="model",
        size=Size(name="mlp_layers", letter="LM", help="MLP sub-layers, each removed alone"),
        dims={},
        exists=lambda arch: arch.is_hybrid,
    ),
    Axis(
        name="hidden",
        scope="model",
        size=Size(
            name="hidden_size", letter="H", help="channels of the residual stream", rows=one_row
        ),
        dims={"hidden": one_each("hidden_size")},
    ),
    HEADS,
    Axis(
        name="ffn",
        kind="mlp",
        size=Size(name="ffn_hidden_size", letter="F", help="neurons of each MLP", rows=one_row),
        dims={"ffn": one_each("ffn_hidden_size"), "fc1": gate_and_up("ffn_hidden_size")},
        tp_split=True,
        exists=lambda arch: arch.mlp_layers > 0 and not is_moe(arch),
    ),
    Axis(
        name="experts",
        kind="mlp",
        size=Size(name="num_experts", letter="E", help="experts of each layer"),
        dims={"experts": one_each("num_experts")},
        exists=is_moe,
    ),
    Axis(
        name="moe_ffn",
        kind="mlp",
        scope="expert",
        size=Size(
            name="moe_ffn_hidden_size", letter="EF", help="neurons of each expert", rows=one_row
        ),
        dims={
            "moe_ffn": one_each("moe_ffn_hidden_size"),
            "moe_fc1": gate_and_up("moe_ffn_hidden_size"),
        },
        tp_split=True,
        exists=is_moe,
    ),
    Axis(
        name="shared_ffn",
        kind="mlp",
        size=Size(
            name="moe_shared_expert_intermediate_size",
            letter="SF",
            help="neurons of the shared experts",
            rows=one_row,
        ),
        dims={
            "shared_ffn": one_each("moe_shared_expert_intermediate_size"),
            "shared_fc1": gate_and_up("moe_shared_expert_intermediate_size"),
        },
        tp_split=True,
        exists=has_shared_experts,
    ),
)
# What pruning may change, by name; everything else of source and target is the same.
SIZES = {size.name: size for axis in AXES for size in axis.sizes}
# Those of depth: of a GPTModel, and of its sub-layers.
DEPTH_SIZES = ("num_layers", "attention_layers", "mlp_layers")
# Dims on which no units lie.
UNCUT = ("head_dim", "vocab", "position", "tokentype")


def axes_of(arch: Arch) -> list[Axis]:
    """Return the axes that a model of ``arch`` has."""
    return [axis for axis in AXES if axis.exists(arch)]


def sizes_of(arch: Arch) -> list[str]:
    """Return the sizes that pruning may change of a model of ``arch``, as it is built."""
    return [size.name for axis in axes_of(arch) for size in axis.sizes]


def has_sublayers(arch: Arch) -> bool:
    """Whether the attention or the MLP of a layer can be left out alone."""
    return not (arch.is_bert or is_moe(arch))


def axes_on(dim: str, arch: Arch) -> list[Axis]:
    """Return the axes of ``arch`` whose units lie on a dim."""
    known = dim in UNCUT or any(dim in axis.dims for axis in AXES)
    assert known, f"no rule to trim the dim {dim!r}"
    return [axis for axis in axes_of(arch) if dim in axis.dims]
