"""Aggregation of a unit's values over positions and samples to one score.

Shape letters in this file:
    s  positions on this rank     n  sample, over the whole calibration set
    c  units on this rank         B  micro-batch

Minitron (arXiv:2407.14679, section 2.2) aggregates n values x by one of

    mean   1/n sum |x|
    l2     sqrt( sum x^2 )
    var    1/n sum (x - 1/n sum x)^2

first over the positions of a sample, then over the samples. All follow from sums, which add up over
blocks of positions, ranks and samples: ``sums_over_positions`` makes them, ``aggregate`` ends them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ext.pruning import native


@dataclass(frozen=True)
class Aggregation:
    """Choices of an aggregation: which activations, and how they become one score per unit."""

    batch: str = "l2"
    """Over samples: mean, l2 or var."""
    sequence: str = "mean"
    """Over the positions of a sample, before that: mean, l2 or var."""
    neurons: str = "post"
    """post: what the activation function returns, of a gated MLP times the other half; pre: what it
    is given, X W1^T (+ bias), of a gated MLP the gate's."""
    heads: str = "norm-first"
    """norm-first: aggregate the L2 norm of a head's output; aggregate-first: aggregate channel by
    channel, then take the L2 norm over the head's channels (Model Optimizer)."""

    def __str__(self) -> str:
        return f"batch={self.batch},seq={self.sequence},neurons={self.neurons},heads={self.heads}"


DEFAULT = Aggregation()


def sums_over_positions(kind: str, x: Tensor, left_out: Tensor | None) -> Tensor:
    """Return the sums over positions that ``kind`` needs.

    Args:
        kind: mean, l2 or var.
        x: [s, B, c], any float dtype.
        left_out: [s, B] bool, true at positions that take no part; None for none.

    Returns:
        [K, B, c] float64. mean: sum |x|. l2: sum x^2. var: sum x and sum x^2. Added in float32 over
        these positions; blocks of them are to be added to each other in float64.
    """
    if left_out is not None:
        x = x.masked_fill(left_out.unsqueeze(-1), 0)  # fill, not multiply: padding may hold NaN
    is_copy = x.dtype != torch.float32
    x = x.float()
    if kind == "mean":
        return (x.abs_() if is_copy else x.abs()).sum(dim=0).double().unsqueeze(0)
    if kind == "l2":
        return x.square().sum(dim=0).double().unsqueeze(0)
    assert kind == "var", f"no rule to sum for {kind!r}"
    # In float32 only around the mean: plain sums of squares lose a variance that is small beside
    # the squared mean.
    count = len(x) if left_out is None else (~left_out).sum(dim=0).clamp_min(1).unsqueeze(-1)
    mean = x.sum(dim=0) / count  # [B, c]
    centred = x - mean
    if left_out is not None:
        centred = centred.masked_fill_(left_out.unsqueeze(-1), 0)
    squares, mean = centred.square().sum(dim=0).double(), mean.double()
    return torch.stack([count * mean, squares + count * mean.square()])


def aggregate(kind: str, sums: Sequence[Tensor] | Tensor, count: Tensor) -> Tensor:
    """Return ``kind`` of ``count`` values with these float64 sums, of ``sums_over_positions``."""
    if kind == "mean":
        return sums[0] / count
    if kind == "l2":
        return sums[-1].sqrt()
    assert kind == "var", f"no rule to aggregate by {kind!r}"
    return (sums[-1] / count - (sums[0] / count).square()).clamp_min(0)


class OverSamples:
    """Sums over samples of v, the aggregate over the positions of each sample.

        sums = [ sum_n w v, sum_n w v^2 ]     count = sum_n w

    Ranks that hold other positions of the same sample are added before v is formed. Adding finished
    sums instead would raise no error and give wrong numbers.

    float64: a few vectors per micro-batch, which cost little and leave the float32 sums over
    positions as the only rounding. float32 would lose a variance over samples of similar v.
    """

    def __init__(
        self, num_units: int, sequence: str, position_groups: Sequence[ProcessGroup], device: Any
    ):
        """Start with no samples.

        Args:
            num_units: c, the units on this rank.
            sequence: aggregation over positions.
            position_groups: together, the ranks that hold the other positions of the same samples.
            device: where the model runs.
        """
        self.sums = torch.zeros(2, num_units, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sequence = sequence
        self.position_groups = position_groups

    def add(self, sums: Tensor, num_positions: Tensor, weights: Tensor) -> None:
        """Add the samples of one micro-batch. One collective per position group.

        Args:
            sums: [K, B, c] float64, of ``sums_over_positions`` over this rank's positions; changed.
            num_positions: [B, 1] float64, those of the whole sample that take part, at least 1.
            weights: [B] float64, w.
        """
        for group in self.position_groups:
            torch.distributed.all_reduce(sums, group=group)
        totals = self.sums, self.count
        if native.add_samples(totals, self.sequence, sums, num_positions, weights):
            return
        values = aggregate(self.sequence, sums, num_positions).T  # [c, B]
        self.sums[0].addmv_(values, weights)
        self.sums[1].addmv_(values.square(), weights)
        self.count += weights.sum()
