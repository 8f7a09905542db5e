"""The one table of a model's weights.

Trimming, parameter counts, FLOPs, initialisation and shape checks read the same table: a new weight
is a new row, and a weight without a row is an error that names it.

A row lists a named dim for each of its tensor's. Those of a kind of sub-layer stand in its module
(``kinds``); outside the layers there are

    hidden    hidden_size                                  channels of the residual stream
    vocab     padded_vocab_size
    position  max_position_embeddings
    tokentype num_tokentypes
"""

from itertools import takewhile
from math import prod

from megatron_ext.arch import bert
from megatron_ext.arch.kinds import KINDS, MODULES
from megatron_ext.arch.rows import Weight, norm
from megatron_ext.arch.sizes import Arch

# What the name of a weight in a layer begins with; the second in a BertModel.
LAYER_PREFIXES = ("decoder.layers.", "encoder.layers.")


def dim_sizes(arch: Arch) -> dict[str, int]:
    """Return the length of every named dim."""
    sizes = {
        "hidden": arch.hidden_size,
        "vocab": arch.padded_vocab_size,
        "position": arch.max_position_embeddings,
    }
    if arch.num_tokentypes:
        sizes["tokentype"] = arch.num_tokentypes
    for kind in MODULES:
        sizes |= kind.dims(arch)
    return sizes


def weights(arch: Arch) -> list[Weight]:
    """Return the table of ``arch``, in the order of the forward pass.

    Names are those on disk: Transformer Engine's, with each norm inside the linear layer that
    follows it, which megatron-core writes for its local layers too. The norm before a router stands
    alone. A weight of the experts is one tensor: [experts, ...]. A GPTModel's checkpoint stacks the
    layers, a HybridModel's puts the number of the sub-layer behind ``layers.``: ``names_on_disk``.
    """
    layer = LAYER_PREFIXES[arch.is_bert]
    rows = [Weight("embedding.word_embeddings.weight", ("vocab", "hidden"))]
    if arch.position_embedding_type == "learned_absolute":
        rows += [Weight("embedding.position_embeddings.weight", ("position", "hidden"))]
    if arch.num_tokentypes:
        rows += [Weight("embedding.tokentype_embeddings.weight", ("tokentype", "hidden"))]
    for kind in arch.kinds:
        rows += KINDS[kind].weights(arch, layer)
    final_norm = "final_norm" if arch.is_hybrid else "final_layernorm"
    rows += norm(arch, f"{layer.removesuffix('layers.')}{final_norm}.")
    if arch.is_bert:
        rows += bert.head_weights(arch)
    if arch.untie_embeddings_and_output_weights:
        rows += [Weight("output_layer.weight", ("vocab", "hidden"))]
    if arch.is_bert:
        rows += [Weight("output_layer.bias", ("vocab",), "zeros")]
    return rows


def layer_key(key: str, layer: int) -> str:
    """Return a layer's name in the per-layer style: ``decoder.layers.3.mlp...``."""
    prefix = next(prefix for prefix in LAYER_PREFIXES if key.startswith(prefix))
    return f"{prefix}{layer}.{key.removeprefix(prefix)}"


def kind_of(key: str, arch: Arch) -> str | None:
    """Return the kind of sub-layer of what stands beside weights, by the name most like its own."""
    if not key.startswith(LAYER_PREFIXES):
        return None
    rows = [weight for weight in weights(arch) if weight.per_layer]

    def parts_in_common(weight: Weight) -> int:
        both = zip(weight.key.split("."), key.split("."), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))

    return max(rows, key=parts_in_common).kind


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


def shape(weight: Weight, arch: Arch, layer: int | None = None) -> tuple[int, ...]:
    """Return the shape of ``weight`` in one layer, a number within its kind.

    Without ``layer``, ``arch`` is that of a layer (``Arch.at``), or its layers are alike.
    """
    sizes = dim_sizes(arch if layer is None else arch.at(weight.kind, layer))
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
            total += numel_of(weight, arch, active=active)
    return total


def forward_flops(arch: Arch, seq_length: int) -> int:
    """Return the floating-point operations of one token's forward pass, at 2 per multiply-add.

    Matrix multiplies only, of the experts those that compute a token. A training step costs three
    times as much (backward is two forwards).
    """
    sizes = dim_sizes(arch)
    matrices = [w for w in weights(arch) if len(w.dims) > 1 and w.per_layer]
    layers = sum(numel_of(weight, arch, active=True) for weight in matrices)
    layers += multiply_adds_beside(arch, seq_length)
    output = sizes["vocab"] * sizes["hidden"] + arch.is_bert * sizes["hidden"] ** 2
    return 2 * (layers + output)


def multiply_adds_beside(arch: Arch, seq_length: int) -> int:
    """Return those of one token's forward pass beside the weights': attention, Mamba's states."""
    return sum(
        KINDS[kind].multiply_adds(layer, seq_length) * times
        for kind in arch.kinds
        for layer, times in arch.alike(kind).items()
    )


def numel_of(weight: Weight, arch: Arch, *, active: bool = False) -> int:
    """Return the elements of ``weight`` in all layers, or of its active experts."""
    numel = sum(prod(shape(weight, layer)) * n for layer, n in arch.alike(weight.kind).items())
    if active and is_of_experts(weight) and arch.num_experts is not None:
        return numel // arch.num_experts * arch.moe_router_topk
    return numel
