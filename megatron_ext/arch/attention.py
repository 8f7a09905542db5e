"""Attention of query heads in groups, each group with a key and a value: the sub-layer ``*``.

Named dims:
    heads     num_attention_heads * kv_channels            concatenated head outputs
    qkv       per query group: its query heads, key, value (all of kv_channels rows)
    head_dim  kv_channels
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ext.arch.per_layer import switches
from megatron_ext.arch.rows import (
    REQUIRED,
    Axis,
    Size,
    Weight,
    linear,
    norm,
    norm_behind,
    repeated,
    size,
    sublayers,
)

if TYPE_CHECKING:
    from megatron_ext.arch.sizes import Arch

NAME, SYMBOL = "attention", "*"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of attention; each is a field of ``Arch``."""

    num_attention_heads: int = size(REQUIRED, "query heads", typed=None, at_least=1)
    num_query_groups: int = size(
        REQUIRED,
        "key/value heads; counts only with --group-query-attention",
        typed=1,
        at_least=1,
    )
    """Equal to num_attention_heads without grouped queries."""
    kv_channels: int = size(
        REQUIRED,
        "channels of one head; default hidden-size / num-attention-heads",
        typed=None,
        at_least=1,
    )
    """Not tied to hidden_size / num_attention_heads."""
    add_qkv_bias: bool = size(False, "a bias on query, key and value, whatever the others have")
    qk_layernorm: bool = size(False, "a norm on the query and the key of each head")
    window_size: str | None = size(
        None,
        "tokens before its own that a query looks at, and 0 behind it: 127,0",
    )
    window_attn_skip_freq: str | None = size(
        None,
        "layers without --window-size: every N-th, or a list with a 0 for each, '([1]*5+[0])*4'",
    )
    softmax_scale: float | None = None
    """Factor of a query times a key; None for 1 / sqrt(kv_channels). No flag, as in Megatron-LM."""
    attention_dropout: float = size(
        0.1, "share of attention weights dropped in training", at_least=0, below=1
    )

    @property
    def window(self) -> int | None:
        """Tokens before its own that a query looks at; None for all."""
        return None if self.window_size is None else int(self.window_size.split(",")[0])


def window_text(value: Any) -> str:
    """Return a window as its flag takes it, from that or from the pair that is saved.

    Raises ``ValueError`` for a window that looks at tokens behind its own, or at all before it.
    """
    words = value.strip("()").split(",") if isinstance(value, str) else list(value)
    if len(words) != 2 or not str(words[0]).strip().isdecimal() or str(words[1]).strip() != "0":
        raise ValueError(f"--window-size {value}: write N,0: N tokens before its own, none behind.")
    return f"{int(words[0])},0"


def score_scale(arch: "Arch") -> float:
    """Return the factor of a query's scores: ``softmax_scale``, or what it is by default."""
    return arch.kv_channels**-0.5 if arch.softmax_scale is None else arch.softmax_scale


def problems(arch: "Arch") -> Iterator[str]:
    """Yield how these sizes contradict each other."""
    if arch.window_size is None and arch.window_attn_skip_freq is not None:
        yield "--window-attn-skip-freq needs --window-size."
    if arch.window_size is not None and arch.is_bert:
        yield "--window-size does not go with --bert-no-binary-head."
    if arch.softmax_scale == 0:
        yield "softmax_scale is 0: no query would differ from another."
    if arch.num_attention_heads % arch.num_query_groups:
        yield (
            f"--num-attention-heads {arch.num_attention_heads} is not a multiple of "
            f"--num-query-groups {arch.num_query_groups}."
        )


def dims(arch: "Arch") -> dict[str, int]:
    """Return the length of every named dim."""
    return {
        "heads": arch.num_attention_heads * arch.kv_channels,
        "qkv": (arch.num_attention_heads + 2 * arch.num_query_groups) * arch.kv_channels,
        "head_dim": arch.kv_channels,
    }


def weights(arch: "Arch", layer: str) -> list[Weight]:
    """Return the rows of the table; ``layer`` is what their names begin with."""
    attention, bias = f"{layer}self_attention.", arch.add_bias_linear
    qkv = f"{attention}linear_qkv"
    qkv_bias = bias or arch.add_qkv_bias
    rows = norm(arch, f"{qkv}.layer_norm_", kind=NAME)
    rows += linear(qkv, ("qkv", "hidden"), bias=qkv_bias, kind=NAME)
    if arch.qk_layernorm:
        rows += norm(arch, f"{attention}q_layernorm.", "head_dim", kind=NAME)
        rows += norm(arch, f"{attention}k_layernorm.", "head_dim", kind=NAME)
    projection = f"{attention}linear_proj"
    rows += linear(projection, ("hidden", "heads"), bias=bias, init="scaled", kind=NAME)
    return rows + norm_behind(arch, projection, kind=NAME)


def multiply_adds(arch: "Arch", seq_length: int) -> int:
    """Return one token's multiply-adds outside of weight matrices: scores and sums of values.

    A layer's, on average over layers with a window and without.

    Causal attention counts half of the square, seq_length / 2 keys a token on average; a
    BertModel's all of it; a window of w tokens, its own too, w - w**2 / (2 seq_length).
    """
    channels = arch.num_attention_heads * arch.kv_channels
    width = seq_length if arch.window is None else min(arch.window + 1, seq_length)
    windows = switches(arch, "window_attn_skip_freq") or [1]
    saved = channels * (seq_length - width) ** 2 * sum(windows) // (seq_length * len(windows))
    # Twice the keys of a token: scores and values.
    return channels * seq_length * (1 + arch.is_bert) - saved


def cached_tokens(arch: "Arch", context: int) -> int:
    """Return the tokens whose key and value a sequence of ``context`` keeps, of all layers."""
    layers = arch.attention_layers
    if arch.window is None:
        return layers * context
    cut = switches(arch, "window_attn_skip_freq") or [1] * layers
    return sum(min(context, arch.window + 1) if on else context for on in cut)


def _head_outputs(arch: "Arch") -> list[Sequence[int]]:
    """Concatenated head outputs: kv_channels positions of each head."""
    return [repeated(range(arch.num_attention_heads), arch.kv_channels)]


def _queries_keys_values(arch: "Arch") -> list[Sequence[int]]:
    """Queries, key and value of one query group after another: kv_channels positions each.

    A key and value have the unit of their group, heads + group (``Axis.within``), or of the head
    where every head has its own.
    """
    heads, groups = arch.num_attention_heads, arch.num_query_groups
    blocks: list[int] = []
    for group in range(groups):
        queries = range(group * heads // groups, (group + 1) * heads // groups)
        owner = heads + group if groups < heads else group
        blocks += [*queries, owner, owner]
    return [repeated(blocks, arch.kv_channels)]


DEPTH = sublayers(NAME, "LA", "attention sub-layers")
HEADS = Axis(
    name="heads",
    kind=NAME,
    size=Size(
        name="num_attention_heads",
        letter="A",
        help="query heads, the same number of each query group",
        rows=lambda arch: arch.kv_channels,
        by_layer=True,
    ),
    within=Size(
        name="num_query_groups",
        letter="G",
        help="key/value heads, removed as groups; keep a multiple of every TP size to be used",
        rows=lambda arch: 2 * arch.kv_channels,
        by_layer=True,
    ),
    dims={"heads": _head_outputs, "qkv": _queries_keys_values},
    tp_split=True,
    exists=lambda arch: NAME in arch.kinds,
)
AXES = (HEADS,)
UNCUT = ("head_dim",)
