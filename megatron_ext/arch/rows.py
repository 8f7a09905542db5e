"""Rows of which the tables are made: sizes, weights, and what pruning cuts."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from megatron_ext.arch.sizes import Arch

# Indices along a tensor dim as sections, one behind the other: each says the unit of every index.
Sections = Callable[["Arch"], list[Sequence[int]]]

REQUIRED: Any = object()


def size(default: Any, help: str, *, typed: Any = REQUIRED, **flag: Any) -> Any:
    """Declare a size of ``Arch``: a saved arg, and a flag of the same name.

    Args:
        default: of a checkpoint whose args do not have it; ``REQUIRED`` for none.
        help: of the flag: unit and the meaning of special values.
        typed: the flag's default, if it is another.
        flag: what else ``cli.parser.flag`` takes.
    """
    on_command_line = default if typed is REQUIRED else typed
    metadata = {"flag": {"default": on_command_line, "help": help, **flag}}
    if default is REQUIRED:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Weight:
    """A weight as it stands in a checkpoint."""

    key: str
    """Name of the tensor; in a layer, without the layer's number."""
    dims: tuple[str, ...]
    """A named dim for each of the tensor's."""
    init: str = "normal"
    """normal: std; scaled: std / sqrt(sub-layers); ones and zeros (a norm's gamma, a bias); conv,
    step and decay of Mamba: ``model.initial.DRAWN``."""
    kind: str | None = None
    """The kind of sub-layer that has one (``kinds``); None outside the layers."""

    @property
    def per_layer(self) -> bool:
        """Whether each layer has one, or each sub-layer of its kind."""
        return self.kind is not None


def linear(
    key: str, dims: tuple[str, str], *, bias: bool, init: str = "normal", kind: str | None = None
) -> list[Weight]:
    """Return the weight of a linear layer, [out, in], and its bias."""
    rows = [Weight(f"{key}.weight", dims, init, kind)]
    return rows + [Weight(f"{key}.bias", dims[:1], "zeros", kind)] * bias


def norm(arch: "Arch", key: str, dim: str = "hidden", *, kind: str | None = None) -> list[Weight]:
    """Return gamma of a norm and, of a LayerNorm, its bias; ``key`` ends before their names."""
    ones = "zeros" if arch.apply_layernorm_1p else "ones"
    rows = [Weight(f"{key}weight", (dim,), ones, kind)]
    has_bias = arch.normalization == "LayerNorm"
    return rows + [Weight(f"{key}bias", (dim,), "zeros", kind)] * has_bias


def norm_behind(arch: "Arch", key: str, *, kind: str) -> list[Weight]:
    """Return the norm of a sub-layer's output, of a model that has them; ``key`` is its matrix."""
    rows = norm(arch, f"{key}.post_layernorm.", kind=kind)  # Megatron Bridge's name
    return rows * arch.sandwich_norm


@dataclass(frozen=True, kw_only=True)
class Size:
    """A number of units, or of groups of them, that pruning changes."""

    name: str
    """Megatron's, an attribute of ``Arch``."""
    letter: str
    """In the name of a candidate of a search."""
    help: str
    """Text of its --target- flag's help: the thing that is counted."""
    rows: Callable[["Arch"], int] | None = None
    """Rows of a weight matrix that one unit takes; None where no matrix grows with it."""
    by_layer: bool = False
    """Sub-layers of one model may differ in it: ``Arch.by_layer``."""

    @property
    def noun(self) -> str:
        """The name as words in a message: ``query groups``."""
        return self.name.replace("num_", "").replace("_", " ")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Units of one kind."""

    name: str
    """In scores, plans and error messages."""
    size: Size
    """Number of units."""
    within: Size | None = None
    """Groups of neighbouring units. Units are ranked within their group, and every group that stays
    keeps the same number of units. What group g shares (a query group's key and value) has the unit
    number ``length`` + g, and stays if any unit of group g stays."""
    across: "Axis | None" = None
    """Units that each of these has too, all the same: a score is of one of these and one of those,
    and a unit's is the L2 norm over those that stay."""
    scope: Literal["model", "layer", "expert"] = "layer"
    """Owner of a set of units: the model, each layer, each expert of each layer."""
    kind: str | None = None
    """The kind of sub-layer that has the units (``kinds``); None of the model's."""
    dims: Mapping[str, Sections] = field(default_factory=dict)
    """On which dims the units lie, and how."""
    tp_split: bool = False
    """A tensor-parallel rank holds a share of the units, and of their groups."""
    exists: Callable[["Arch"], bool] = lambda arch: True
    """Whether a model has such units."""

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes that pruning this axis changes."""
        return (self.size,) if self.within is None else (self.size, self.within)

    def length(self, arch: "Arch", layer: int | None = None) -> int:
        """Return how many units a vector of this axis has, in a layer of its kind."""
        return getattr(arch.at(self.kind, layer), self.size.name)

    def num_scores(self, arch: "Arch", layer: int | None = None) -> int:
        """Return how many scores one vector of this axis has: [units, units across] flattened."""
        return self.length(arch, layer) * (self.across.length(arch, layer) if self.across else 1)

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


def sublayers(kind: str, letter: str, help: str) -> Axis:
    """Return the axis of depth of one kind of sub-layer, each removed alone."""
    return Axis(
        name=kind,
        scope="model",
        size=Size(name=f"{kind}_layers", letter=letter, help=f"{help}, each removed alone"),
        exists=lambda arch: arch.is_hybrid and kind in arch.kinds,
    )


def read_values(text: str) -> int | tuple[int, ...]:
    """Return a size, or one for each layer: 64 of ``64``, (64, 48, 48) of ``64,2x48``.

    Raises:
        ValueError: the text is neither.
    """
    values: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(?:(\d+)x)?(\d+)", part.strip())
        if match is None:
            raise ValueError(f"{text!r} is no whole number, nor one for each layer as 64,2x48,64")
        values += [int(match[2])] * int(match[1] or 1)
    return values[0] if text.strip().isdigit() else tuple(values)


def layer_of(vector: str) -> int | None:
    """Return the layer in the name of a vector: 3 of ``moe_ffn.3.7``, None of ``hidden``."""
    _, *numbers = vector.split(".")
    return int(numbers[0]) if numbers else None


def kept_layers(kept: Mapping[str, Sequence[int]], kind: str | None) -> Sequence[int]:
    """Return the sub-layers of a kind that ``kept`` has, numbers within the kind."""
    return kept["layers" if "layers" in kept or kind is None else kind]


def one_row(arch: "Arch") -> int:
    """Each is one row of a matrix product."""
    return 1


def one_each(size: str) -> Sections:
    """Position i belongs to unit i."""
    return lambda arch: [range(getattr(arch, size))]


def gate_and_up(size: str) -> Sections:
    """Output of an MLP's first matrix: [gate ; up] of each neuron, or one of the two."""
    return lambda arch: [range(getattr(arch, size))] * (2 if arch.is_gated else 1)


def repeated(units: Iterable[int], times: int) -> list[int]:
    """Return each unit as often as it has positions."""
    return [unit for unit in units for _ in range(times)]
