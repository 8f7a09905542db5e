"""Small layouts that stand for a large one. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations, product
from math import prod
from typing import Any

from megatron_ext.cli.flag_checks import model_parallel_size


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Sizes of a layout: ranks of each kind of parallelism."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    """Ranks that share the experts, a divisor of cp x dp."""

    @property
    def total(self) -> int:
        """All ranks."""
        return self.tp * self.pp * self.cp * self.dp

    def __str__(self) -> str:
        sizes = {f.name.upper(): getattr(self, f.name) for f in fields(self)}
        text = " x ".join(f"{k} {n}" for k, n in sizes.items() if n > 1 and k != "EP")
        return (text or "DP 1") + f", EP {self.ep}" * (self.ep > 1)


def ranks_of(parallel: Any, world_size: int) -> Ranks:
    """Return the layout in the flags ``parallel`` on ``world_size`` ranks."""
    return Ranks(
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size,
        dp=world_size // model_parallel_size(parallel),
        ep=parallel.expert_model_parallel_size,
    )


def small_layouts(real: Ranks, max_ranks: int) -> list[Ranks]:
    """Return the layouts of at most ``max_ranks`` that together stand for ``real``.

    A size stays as it is or becomes 2, data parallelism becomes 2 (4 where the experts take a part
    of it only): the layout with the most ranks that fits. Where even 2 of each are too many, as
    many sizes as fit are 2 at once, every combination of them in turn.
    """
    sizes = {axis: n for axis in ("tp", "pp", "cp", "dp") if (n := getattr(real, axis)) > 1}
    choices = {axis: (n, 2) for axis, n in sizes.items()}
    if "dp" in sizes:
        choices["dp"] = (4, 2) if real.ep > 1 and real.dp >= 4 else (2,)
    fitting = [
        found
        for several in product(*choices.values())
        if (found := _ranks(dict(zip(choices, several, strict=True)), real.ep)).total <= max_ranks
    ]
    if fitting:
        return [max(fitting, key=lambda ranks: (ranks.total, ranks.pp, ranks.tp))]
    at_once = max_ranks.bit_length() - 1
    return [_ranks(dict.fromkeys(axes, 2), real.ep) for axes in combinations(sizes, at_once)]


def _ranks(sizes: dict[str, int], ep: int) -> Ranks:
    shared = prod(sizes.get(axis, 1) for axis in ("cp", "dp"))
    return Ranks(**sizes, ep=next(n for n in (ep, 2, 1) if n <= ep and shared % n == 0))


def envelope(layouts: Sequence[Ranks]) -> Ranks:
    """Return the largest of each size: a model that fits it fits each of ``layouts``."""
    return Ranks(**{f.name: max(getattr(x, f.name) for x in layouts) for f in fields(Ranks)})
