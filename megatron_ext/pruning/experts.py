"""Sums per sample of what the experts compute, although tokens were sent to other ranks.

Shape letters in this file:
    R  ranks that exchange tokens (tp x ep)     E  experts of a layer     c  values of an expert
    s  positions on one of them                 e  experts on this rank   n  tokens of an expert
    B  micro-batch                              K  sums of an aggregation

An expert gets tokens of all R ranks, in no order of samples. Their sums per sample go back to the
ranks that own the samples, which then hold [K, B, E * c] over their own positions, as from any
other tensor that is whole in its units and split in its positions.

An expert's activation is 0 at positions that were not routed to it: a mean over positions is one
over all positions of a sample. What enters the second matrix, and so the expert's output, has
been multiplied by the router's probability: scores see what reaches the residual stream. (Before
the activation function there is no such factor.)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ExpertTap:
    """The experts of one layer that are listened to, and what is taken from them."""

    mlp: nn.Module
    """megatron-core's MoELayer, with the all-gather token dispatcher."""
    linear: str
    """The module of each expert whose forward pass is tapped."""
    values: Callable[[Tensor, Any, ProcessGroupCollection], Tensor]
    """(first input [n, .], output, groups) of that module -> [n, c on this rank]."""
    is_split: bool
    """Each rank of expt_tp has values of its own; otherwise all have the same."""

    def modules(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield the tapped module of each expert of this rank."""
        for expert, mlp in enumerate(self.mlp.experts.local_experts):
            yield expert, getattr(mlp, self.linear)


def expert_input(before: Tensor, _: Any, groups: ProcessGroupCollection) -> Tensor:
    """Return the module's input alone."""
    return before


def expert_norm(_: Tensor, output: Any, groups: ProcessGroupCollection) -> Tensor:
    """Return the L2 norm of an expert's output, [n, 1] float32.

    One collective over expt_tp, whose ranks hold partial sums.
    """
    x = output[0] if isinstance(output, tuple) else output
    if groups.expt_tp.size() > 1:
        x = x.clone()
        torch.distributed.all_reduce(x, group=groups.expt_tp)
    return torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)


class DispatchedSums:
    """Sums over positions of the tokens that reached this rank's experts in one micro-batch."""

    def __init__(
        self, tap: ExpertTap, sequence: str, groups: ProcessGroupCollection, left_out: Tensor
    ):
        """Begin at 0.

        Args:
            tap: what is listened to.
            sequence: aggregation over positions.
            groups: megatron-core's tp_ep, ep and expt_tp.
            left_out: [R, s, B] bool, true at positions that take no part.
        """
        self.tap, self.sequence, self.groups, self.left_out = tap, sequence, groups, left_out
        self.parts: dict[int, Tensor] = {}

    def add(self, expert: int, x: Tensor) -> None:
        """Add the values [n, c] of the ``expert``-th expert of this rank, tokens in their order."""
        ranks, _, batch = self.left_out.shape
        routed = self.tap.mlp.token_dispatcher.local_map[:, expert].view_as(self.left_out)
        rank, position, sample = routed.nonzero(as_tuple=True)  # [n]
        x = x.masked_fill(self.left_out[rank, position, sample].unsqueeze(-1), 0).double()
        kinds = {"mean": (x.abs(),), "l2": (x.square(),), "var": (x, x.square())}
        powers = torch.stack(kinds[self.sequence])  # [K, n, c]
        sums = powers.new_zeros(len(powers), ranks * batch, x.size(-1))
        self.parts[expert] = sums.index_add_(1, rank * batch + sample, powers)

    def sent_home(self) -> Tensor:
        """Return [K, B, E * c] over the positions of this rank. One collective over tp_ep."""
        ranks, _, batch = self.left_out.shape
        # [K, R * B, e, c]; e: experts of this rank; c: its units of each.
        sums = torch.stack([self.parts[i] for i in range(len(self.parts))], dim=2)
        num_sums, num_experts, width = sums.size(0), sums.size(2), sums.size(3)
        parts = sums.view(num_sums, ranks, batch, num_experts, width).transpose(0, 1).contiguous()
        # [R, K, B, e, c]: to each rank of tp_ep the sums over its positions.
        if ranks > 1:
            received = torch.empty_like(parts)
            torch.distributed.all_to_all_single(received, parts, group=self.groups.tp_ep)
            parts = received
        # Rank in tp_ep = rank in ep * size of expt_tp + rank in expt_tp.
        split = self.groups.expt_tp.size()
        parts = parts.view(-1, split, num_sums, batch, num_experts, width)  # [ep, tp, K, B, e, c]
        if not self.tap.is_split:
            parts = parts[:, :1]  # all of expt_tp hold the same
        # [K, B, ep, e, tp, c]: all experts in their order, and all units of each.
        return parts.permute(2, 3, 0, 4, 1, 5).reshape(num_sums, batch, -1)


def gather_left_out(loss_mask: Tensor, groups: ProcessGroupCollection, split: int) -> Tensor:
    """Return [R, s, B] bool, the positions of each rank of tp_ep that take no part. One collective.

    Args:
        loss_mask: [B, s * split], 0 at positions that take no part; of this context-parallel rank.
        groups: megatron-core's tp and tp_ep.
        split: tensor-parallel ranks that share these positions.
    """
    own = (loss_mask == 0).T.chunk(split)[groups.tp.rank() if split > 1 else 0]
    ranks = groups.tp_ep.size()
    if ranks == 1:
        return own.unsqueeze(0)
    gathered = own.new_empty(ranks, *own.shape, dtype=torch.uint8)
    torch.distributed.all_gather(
        list(gathered.unbind()), own.to(torch.uint8).contiguous(), group=groups.tp_ep
    )
    return gathered.bool()
