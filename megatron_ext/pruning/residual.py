"""Residual information of pruned heads: what a pruned head leaves to a kept one.

Of L heads, the most important first and counted from 1, K are kept. Head i of the last 2K - L + 1
to K is paired with head 2K - i + 1: the weakest kept head with the strongest pruned one, outwards
from there (arXiv:2407.14679, section 2.3; its interval begins one too low, at a partner L + 1).

    paper   head_i <- head_i + (head_i - head_{2K-i+1}) = 2 head_i - head_{2K-i+1}
    laco    head_i <- head_i + (head_{2K-i+1} - head_i) = head_{2K-i+1}

The second has the sign of the layer merge that the paper names as its model (LaCo, Yang et al.
2024) with one merged layer: the pruned head *replaces* the kept one, which keeps its columns of the
output matrix.

What changes of a head are its query rows. Keys and values too where each head has its own; under
grouped queries the other heads of the group read them. The output matrix is trimmed only.
"""

from collections.abc import Sequence

from megatron_ext.arch import Arch
from megatron_ext.runtime.errors import USAGE, UserError

NONE, PAPER, LACO = "none", "paper", "laco"
MODES = (NONE, PAPER, LACO)

Pairs = tuple[tuple[int, int], ...]
"""(kept head, pruned head), global numbers from 0; ascending."""


def mirrored_pairs(ranking: Sequence[int], count: int) -> Pairs:
    """Return the pairs of heads that compete with each other, ``count`` of which are kept.

    Args:
        ranking: L heads, the most important first.
        count: K.

    Raises:
        UserError: L > 2K: a kept head would have two partners.
    """
    length = len(ranking)
    if length > 2 * count:
        raise UserError(
            f"--head-residual pairs each pruned head with a kept one: {count} of {length} heads "
            "are too few, keep half of them.",
            USAGE,
        )
    # ranking[i - 1] is head i of the formula.
    partners = range(2 * count - length + 1, count + 1)
    return tuple(sorted((ranking[i - 1], ranking[2 * count - i]) for i in partners))


def bad_pairs(pairs: Pairs, heads: Sequence[int], arch: Arch) -> str | None:
    """Return what is wrong with the pairs of a layer that keeps ``heads``, or None."""
    kept, pruned = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if len(set(kept)) < len(kept) or not set(kept) <= set(heads):
        return f"the heads {kept} are not different kept ones"
    if sorted(pruned) != sorted(set(range(arch.num_attention_heads)) - set(heads)):
        return f"the heads {pruned} are not the pruned ones"
    per_group = arch.num_attention_heads // arch.num_query_groups
    for pair in pairs:
        if per_group > 1 and pair[0] // per_group != pair[1] // per_group:
            return f"the heads {list(pair)} are of different query groups"
    return None
