"""The pattern of a model's sub-layers: one of Megatron's symbols for each, from first to last.

A sub-layer adds one residual branch: attention or an MLP. A layer of a GPTModel is two of them:

    *-*-*-   three whole layers       *-**-   the second layer without its MLP, the third whole
    *E*E     with experts as MLPs     |       in Megatron-LM's flag: a pipeline stage ends

Sub-layers are counted within their kind (``kinds``): ``mlp`` 1 of ``*-**-`` is the last symbol.
Where all layers are whole, that is the number of the layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

from megatron_ext.arch.kinds import SYMBOLS

STAGE = "|"


def whole_layers(num_layers: int, *, experts: bool = False) -> str:
    """Return the pattern of a GPTModel."""
    return (SYMBOLS["attention"] + SYMBOLS["moe" if experts else "mlp"]) * num_layers


def problems(pattern: str, num_layers: int, *, experts: bool) -> Iterator[str]:
    """Yield what keeps a pattern from being that of a model with or without experts."""
    known = ", ".join(f"{symbol} ({kind})" for kind, symbol in SYMBOLS.items())
    for symbol in dict.fromkeys(pattern):
        if symbol == STAGE:
            yield (
                f"hybrid_layer_pattern {pattern}: leave out {STAGE}, and cut pipeline stages with "
                "--pipeline-model-parallel-layout, a t for each sub-layer."
            )
        elif symbol not in SYMBOLS.values():
            yield f"hybrid_layer_pattern {pattern}: {symbol!r} is not built here, only {known}."
    if not pattern:
        yield "hybrid_layer_pattern is empty: a model has at least one sub-layer."
    if len(pattern) != num_layers:
        yield (
            f"hybrid_layer_pattern {pattern} has {len(pattern)} sub-layers, num_layers is "
            f"{num_layers}."
        )
    if experts != (SYMBOLS["moe"] in pattern):
        flag = "goes with" if experts else "needs"
        yield f"hybrid_layer_pattern {pattern}: an {SYMBOLS['moe']} {flag} --num-experts."


def kinds(pattern: str) -> tuple[str, ...]:
    """Return the kinds of sub-layers that a pattern has, in the order of ``kinds.MODULES``."""
    return tuple(kind for kind, symbol in SYMBOLS.items() if symbol in pattern)


def positions(pattern: str, kind: str) -> tuple[int, ...]:
    """Return where the sub-layers of a kind stand in the pattern."""
    return tuple(i for i, symbol in enumerate(pattern) if symbol == SYMBOLS[kind])


def without_last(pattern: str, counts: Mapping[str, int]) -> str:
    """Return the pattern without the last sub-layers of each kind beyond so many."""
    return kept_of(pattern, {kind: range(count) for kind, count in counts.items()})


def kept_of(pattern: str, kept: Mapping[str, Sequence[int]]) -> str:
    """Return the pattern of the sub-layers that are kept, numbers by kind."""
    stay = {positions(pattern, kind)[number] for kind in kept for number in kept[kind]}
    return "".join(symbol for i, symbol in enumerate(pattern) if i in stay)


def in_stages(pattern: str, counts: Sequence[int]) -> str:
    """Return the pattern cut into pipeline stages of so many sub-layers, as ``*-|*-``."""
    ends = [0, *accumulate(counts)]
    return STAGE.join(pattern[start:end] for start, end in pairwise(ends))
