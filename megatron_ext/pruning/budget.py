"""Budgets of a search: what a candidate costs, in numbers that follow from its sizes. Pure."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_ext.arch import Arch, forward_flops, num_parameters
from megatron_ext.arch.attention import cached_tokens
from megatron_ext.arch.mamba import state_numel
from megatron_ext.runtime.errors import USAGE, UserError

# Weights and the cache of keys and values are bf16 where a model is used.
BYTES = 2
UNITS = {"": 1, "x": 1, "K": 1e3, "M": 1e6, "B": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Use:
    """Context and batch at which a candidate's cache and attention are counted."""

    context: int
    """Tokens of a sequence."""
    batch: int
    """Sequences at a time."""


def kv_bytes(arch: Arch, use: Use) -> int:
    """Return the bytes of the keys and values of all sequences, in bf16, and of Mamba's states.

    Mamba's states do not grow with the context.
    """
    groups = sum(layer.num_query_groups * n for layer, n in arch.alike("attention").items())
    # Layers differ in groups or in windows, never in both.
    tokens = groups * cached_tokens(arch, use.context) // max(arch.attention_layers, 1)
    states = arch.mamba_layers and state_numel(arch) * arch.mamba_layers
    return (2 * arch.kv_channels * tokens + states) * BYTES * use.batch


# Each by its name in --target-budget.
COSTS: Mapping[str, Callable[[Arch, Use], int]] = {
    "params": lambda arch, use: num_parameters(arch),
    "non-embedding": lambda arch, use: num_parameters(arch, embeddings=False),
    "active": lambda arch, use: num_parameters(arch, active=True),
    "weight-bytes": lambda arch, use: num_parameters(arch) * BYTES,
    "kv-bytes": kv_bytes,
    # Of the last token of a sequence, which sees all others: twice the mean of causal attention.
    "flops": lambda arch, use: forward_flops(arch, 2 * use.context),
}


@dataclass(frozen=True)
class Limit:
    """A band of one cost."""

    cost: str
    """One of ``COSTS``."""
    low: float
    high: float


def read_budget(text: str, source: Arch, use: Use, tolerance: float) -> list[Limit]:
    """Return the limits of ``non-embedding=0.5x,kv-bytes=2GiB``: at most so much, each.

    Args:
        text: name=value, by commas. Values are numbers with one of ``UNITS`` behind them; with x,
            shares of what ``source`` has.
        source: the model to prune.
        use: what costs depend on.
        tolerance: a candidate uses some limit up to this share of it, and exceeds none.

    Raises:
        UserError: naming the part that cannot be read.
    """
    limits = []
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        match = re.fullmatch(r"([\d.]+(?:e[+]?\d+)?)(x|K|M|B|KiB|MiB|GiB)?", value)
        if name not in COSTS or match is None:
            raise UserError(
                f"--target-budget {text}: {part.strip()!r}: write {', '.join(COSTS)} = a number "
                f"with {', '.join(UNITS)[2:]} behind it or without; 0.5x is half of the source's.",
                USAGE,
            )
        number, unit = float(match[1]), match[2] or ""
        limit = number * (COSTS[name](source, use) if unit == "x" else UNITS[unit])
        limits.append(Limit(name, limit * (1 - tolerance), limit))
    return limits


def around(params: float, tolerance: float) -> list[Limit]:
    """Return the band of parameters around ``params``."""
    return [Limit("params", params * (1 - tolerance), params * (1 + tolerance))]


def fits(arch: Arch, limits: Sequence[Limit], use: Use) -> bool:
    """Whether a candidate exceeds no limit and reaches the band of one."""
    costs = [(COSTS[limit.cost](arch, use), limit) for limit in limits]
    within = all(cost <= limit.high for cost, limit in costs)
    return within and any(cost >= limit.low for cost, limit in costs)
