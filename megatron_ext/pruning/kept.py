"""Indices that a plan keeps of a tensor's dim, from the unit of every position (``axes``)."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

from megatron_ext.arch import Arch
from megatron_ext.arch.axes import axes_on
from megatron_ext.arch.rows import Axis
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
        _sort_keys(axis, sections, units, plan.kept[axis.vector(layer, expert)], plan.source)
        for axis, sections, units in units_on(dim, plan.source)
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


@lru_cache
def units_on(dim: str, arch: Arch) -> tuple[tuple[Axis, Tensor, Tensor], ...]:
    """Return each axis on a dim with the section and the unit of every position, two [n] int64.

    A unit from ``axis.length`` on is what a group of units shares.
    """
    return tuple((axis, *_units(axis.dims[dim](arch))) for axis in axes_on(dim, arch))


def _units(sections: list[Sequence[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(section) for section in sections])
    section = torch.arange(len(sections)).repeat_interleave(lengths)
    return section, torch.tensor(list(chain(*sections)))


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
