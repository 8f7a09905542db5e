"""The axes that pruning cuts: one row says all that is known of an axis.

Scores, plans, trimming, baselines, the search, --target- flags and what a layout must divide loop
over ``AXES`` and name no axis. A new axis is a row of its kind of sub-layer (``kinds``) and one of
``pruning.taps``: what of a layer measures it.

A row says how units lie on the dims of the table of weights: a dim is a list of sections, one
behind the other, each with the unit of every position. Two query groups of two heads,
2 kv_channels, and a gated MLP of 3 neurons:

    heads  [0 0 1 1 2 2 3 3]
    qkv    [0 0 1 1 4 4 4 4 2 2 3 3 5 5 5 5]     4 and 5 are the groups: their keys and values
    fc1    [0 1 2] [0 1 2]                       gate, up

A position stays if its unit stays. Sections stay in their order; within a section, positions come
in the order of the kept units.

Depth is cut in whole layers (``layers``) or in sub-layers, an axis for each kind: a GPTModel has
the first axis, a HybridModel the others, and a GPTModel's sub-layers are those of the same model as
a HybridModel (``Arch.by_sublayers``). Units of a sub-layer go by its number within its kind, which
is the number of the layer where all layers are whole.
"""

from megatron_ext.arch import per_layer
from megatron_ext.arch.kinds import MODULES
from megatron_ext.arch.rows import Axis, Size, one_each, one_row
from megatron_ext.arch.sizes import Arch

# An axis within layers or experts comes behind theirs.
AXES = (
    Axis(
        name="layers",
        scope="model",
        size=Size(name="num_layers", letter="L", help="transformer layers"),
        exists=lambda arch: not arch.is_hybrid,
    ),
    *(kind.DEPTH for kind in MODULES),
    Axis(
        name="hidden",
        scope="model",
        size=Size(
            name="hidden_size", letter="H", help="channels of the residual stream", rows=one_row
        ),
        dims={"hidden": one_each("hidden_size")},
    ),
    *(axis for kind in MODULES for axis in kind.AXES),
)
# What pruning may change, by name; everything else of source and target is the same.
SIZES = {size.name: size for axis in AXES for size in axis.sizes}
# Those of depth: of a GPTModel, and of its sub-layers.
DEPTH_SIZES = ("num_layers", *(kind.DEPTH.size.name for kind in MODULES))
# Dims on which no units lie.
UNCUT = ("vocab", "position", "tokentype", *(dim for kind in MODULES for dim in kind.UNCUT))


def axes_of(arch: Arch) -> list[Axis]:
    """Return the axes that a model of ``arch`` has."""
    return [axis for axis in AXES if axis.exists(arch)]


def sizes_of(arch: Arch) -> list[str]:
    """Return the sizes that pruning may change of a model of ``arch``, as it is built."""
    return [size.name for axis in axes_of(arch) for size in axis.sizes]


def has_sublayers(arch: Arch) -> bool:
    """Whether a sub-layer can be left out alone."""
    alike = (*per_layer.NAMES, "rotary_base_local")
    return not arch.is_bert and all(getattr(arch, name) is None for name in alike)


def axes_on(dim: str, arch: Arch) -> list[Axis]:
    """Return the axes of ``arch`` whose units lie on a dim."""
    known = dim in UNCUT or any(dim in axis.dims for axis in AXES)
    assert known, f"no rule to trim the dim {dim!r}"
    return [axis for axis in axes_of(arch) if dim in axis.dims]
