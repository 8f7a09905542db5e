"""Indices that a plan keeps of a tensor's dim, from the unit of every position (``axes``)."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

from megatron_ext.arch import Arch
from megatron_ext.arch.axes import axes_on
from megatron_ext.arch.rows import Axis, Sections
from megatron_ext.pruning.plan import Plan


def kept_indices(
    plan: Plan, dim: str, layer: int | None, expert: int | None = None
) -> Tensor | None:
    """Return the [n] int64 positions that stay of a tensor axis, or None if all do.

    Args:
        plan: what is kept.
        dim: a named dim of ``megatron_ext.arch``.
        layer: the layer's number in the source; None for a weight outside the layers.
        expert: the expert's number in the source, of a weight of one expert.
    """
    keys = [
        _sort_keys(
            axis,
            sections,
            units,
            plan.kept[axis.vector(layer, expert)],
            plan.source.at(axis.kind, layer),
        )
        for axis, sections, units in units_on(dim, plan.source, layer)
    ]
    if not keys:
        return None
    # Where units of two axes lie on a dim, indices are sorted by the first, ties by the second. The
    # first must then tell apart what may not mix, as a key from a value.
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    stays = torch.stack(keys).isfinite().all(dim=0)
    order = order[stays[order]]
    return None if torch.equal(order, torch.arange(len(stays))) else order


def units_on(
    dim: str, arch: Arch, layer: int | None = None
) -> Iterator[tuple[Axis, Tensor, Tensor]]:
    """Yield each axis on a dim with the section and the unit of every position, two [n] int64.

    ``layer`` is that of the dim, where layers differ. A unit from ``axis.length`` on is what a
    group of units shares.
    """
    for axis in axes_on(dim, arch):
        yield axis, *_units(axis.dims[dim], arch.at(axis.kind, layer))


@lru_cache(maxsize=1024)
def _units(positions: Sections, arch: Arch) -> tuple[Tensor, Tensor]:
    sections = positions(arch)
    lengths = torch.tensor([len(section) for section in sections])
    numbers = torch.arange(len(sections)).repeat_interleave(lengths)
    return numbers, torch.tensor(list(chain(*sections)))


def _sort_keys(
    axis: Axis, sections: Tensor, units: Tensor, kept: Sequence[int], arch: Arch
) -> Tensor:
    """Return the sort key of every index along the dim, [n] float64; infinity: cut."""
    length, groups = axis.length(arch), getattr(arch, axis.within.name) if axis.within else 0
    rank = torch.full((length + groups,), torch.inf, dtype=torch.float64)
    rank[list(kept)] = torch.arange(len(kept), dtype=torch.float64)
    if groups:  # what a group shares comes behind the last of its units
        in_groups = rank[:length].view(groups, -1)
        last = in_groups.masked_fill(in_groups.isinf(), -1).amax(dim=1)
        rank[length:] = torch.where(last < 0, torch.inf, last + 0.5)
    # A section's keys lie above all of the section before it: sections stay in their order.
    return sections * len(rank) + rank[units]
