"""Importance from activations: what each hook sees, what it keeps, which ranks must agree on it.

Shape letters in this file:
    S  full sequence     s  positions on this rank     n  sample, over the whole calibration set
    C  units of an axis  c  units on this rank         B  micro-batch      H  hidden_size

How scores lie over the ranks follows from the tensor that a hook taps:

    axis     tapped tensor                         shape       units       positions
    ffn      input of mlp.linear_fc2               [S, B, c]   TP-split    whole
      pre    output of mlp.linear_fc1, the gate's  [S, B, c]   TP-split    whole
    heads    input of self_attention.linear_proj   [S, B, c*D] TP-split    whole (D: kv_channels)
    mamba_heads     x of mixer.in_proj's output    [S, B, c*P] TP-split    whole
    mamba_channels  the same                       [S, B, h*P] TP-split    whole (h: heads)
    hidden   output of both norms of a layer       [s, B, H]   whole       TP-split under SP
    layers   input and output of a layer           [s, B, H]   whole       TP-split under SP
      attention, mlp, moe    in a HybridModel, instead: input and output of a sub-layer
    under context parallelism                      as above    as above    also CP-split

    in a mixture of experts, instead of ffn (the first two: see ``pruning.experts``)
    experts     output of an expert's linear_fc2   [n, H]      n tokens of any rank of tp x ep
    moe_ffn     its input; pre: as above           [n, c]
    shared_ffn  the shared experts': as ffn        [S, B, c]   TP-split    whole

Positions of one sample are summed over ranks before they are aggregated. Sums over samples of other
data-parallel ranks, layers of other stages and units of other TP ranks are added once, in
``Importance.collect``. A layer's score is 1 - cos(input, output), a mean over positions whatever
the aggregation of the other axes.

Positions with loss mask 0, the padding of a sample, take no part: a sample of 100 tokens and 28 of
padding is a sample of 100 positions. Several documents in one sample need nothing more: each of
their tokens is what the model is trained on, and a sample remains the unit of data. Whether they
see each other is the model's attention mask (--reset-attention-mask), which acts before any hook.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_ext.arch import Arch
from megatron_ext.arch.axes import axes_of
from megatron_ext.arch.kinds import KINDS
from megatron_ext.arch.rows import Axis
from megatron_ext.pruning.aggregation import (
    DEFAULT,
    Aggregation,
    OverSamples,
    aggregate,
    sums_over_positions,
)
from megatron_ext.pruning.experts import DispatchedSums, ExpertTap, gather_left_out
from megatron_ext.pruning.scores import lengths
from megatron_ext.pruning.taps import MEASURES, Measure, Tap
from megatron_ext.runtime.errors import UserError

# Elements that a hook works on at a time in torch. On a CPU their float32 copies stay in the cache
# of a core (tools/bench/calibration.py); a GPU needs more to be busy.
BLOCK_NUMEL = {"cpu": 2**18, "cuda": 2**22}


@dataclass(frozen=True)
class Listener:
    """A tap of one layer, and where what it hears belongs."""

    axis: Axis
    measure: Measure
    row: tuple[int, int]
    """(layer, tap of this axis in it), numbers from 0 among the layers that have the axis."""
    tap: Tap | ExpertTap
    samples: OverSamples


class Importance:
    """Scores every axis of a model in the same forward passes; outputs and gradients stay as is.

    Use: ``with importance.attached():`` run forward passes, each sample on one data-parallel rank
    and each micro-batch announced by ``expect``; then ``importance.collect()``. Recomputed forward
    passes would count twice: do not run backward.
    """

    def __init__(
        self,
        model_chunks: Sequence[MegatronModule],
        arch: Arch,
        groups: ProcessGroupCollection,
        *,
        sequence_parallel: bool,
        aggregation: Aggregation = DEFAULT,
    ):
        """Prepare the taps of this rank's layers. No collectives.

        Args:
            model_chunks: this rank's part of the model, wrapped (DDP, Float16Module) or not.
            arch: sizes of the whole model.
            groups: megatron-core's tp, pp, cp and dp_cp; with experts tp_ep and expt_tp too.
            sequence_parallel: whether norms see positions split over ``groups.tp``.
            aggregation: how activations become scores.
        """
        self.arch, self.groups, self.aggregation = arch, groups, aggregation
        self.sequence_parallel = sequence_parallel
        self.device = next(model_chunks[0].parameters()).device
        self.axes = axes_of(arch)
        self.listeners = [
            listener
            for chunk in model_chunks
            for layer in unwrap_model(chunk).decoder.layers
            for listener in self._listeners(layer)
        ]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach all taps and detach them on exit, also after an error."""
        handles = []
        for listener in self.listeners:
            is_of_experts = isinstance(listener.tap, ExpertTap)
            handles += (self._attach_experts if is_of_experts else self._attach)(listener)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def expect(self, loss_mask: Tensor) -> None:
        """Say which positions of the next micro-batch take part.

        One collective over cp, with experts one over tp_ep.

        Args:
            loss_mask: [B, s], 0 at positions that take no part; of the positions that this
                context-parallel rank holds, in its order.
        """
        left_out = loss_mask == 0
        counts = (~left_out).sum(dim=1).double()
        if self.groups.cp.size() > 1:
            torch.distributed.all_reduce(counts, group=self.groups.cp)
        # On a GPU any() would wait for all queued kernels: there the mask is always passed on.
        some = left_out.is_cuda or left_out.any()
        self.left_out = left_out.T.contiguous() if some else None  # [s, B]
        self.num_positions = counts.clamp_min(1).unsqueeze(-1)  # [B, 1]
        # A layer's score is a mean over positions, the others' over samples that have any.
        self.weights = {
            axis.name: counts if MEASURES[axis.name].of_layer else (counts > 0).double()
            for axis in self.axes
        }
        if self.arch.num_experts is not None:
            split = self.groups.tp.size() if self.sequence_parallel else 1
            self.left_out_everywhere = gather_left_out(loss_mask, self.groups, split)

    def _attach(self, listener: Listener) -> list[RemovableHandle]:
        tap = listener.tap

        def hook(_: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            self._add(listener, tap.tensors(before, output))

        return [tap.module.register_forward_hook(hook, with_kwargs=True)]

    def _attach_experts(self, listener: Listener) -> list[RemovableHandle]:
        """Sum what the experts see while their layer runs; count its samples when it has run."""
        tap, samples = listener.tap, listener.samples
        running: list[DispatchedSums] = []

        def begin(_: nn.Module, args: Any) -> None:
            running.append(
                DispatchedSums(tap, samples.sequence, self.groups, self.left_out_everywhere)
            )

        def add_of(expert: int) -> Callable:
            @torch.no_grad()
            def add(_: nn.Module, args: tuple, output: Any) -> None:
                running[0].add(expert, tap.values(args[0], output, self.groups))

            return add

        @torch.no_grad()
        def finish(_: nn.Module, args: Any, output: Any) -> None:
            sums = running.pop().sent_home()
            samples.add(sums, self.num_positions, self.weights[listener.axis.name])

        return [
            tap.mlp.register_forward_pre_hook(begin),
            *(module.register_forward_hook(add_of(expert)) for expert, module in tap.modules()),
            tap.mlp.register_forward_hook(finish),
        ]

    def _add(self, listener: Listener, tensors: Sequence[Tensor]) -> None:
        """Sum the values of a tap over this rank's positions."""
        tap, samples, left_out = listener.tap, listener.samples, self.left_out
        if left_out is not None and self.sequence_parallel and not listener.measure.tp_split:
            left_out = left_out.chunk(self.groups.tp.size())[self.groups.tp.rank()]
        sums = tap.sums(samples.sequence, tensors, left_out)
        if sums is None:
            sums = _sums_in_blocks(tap, samples.sequence, tensors, left_out)
        samples.add(sums, self.num_positions, self.weights[listener.axis.name])

    def _listeners(self, layer: nn.Module) -> list[Listener]:
        listeners = []
        for axis in self.axes:
            measure, layers = MEASURES[axis.name], self._layers_of(axis)
            if layer.layer_number - 1 not in layers:
                continue
            taps = measure.taps(layer, self.arch, self.aggregation)
            assert len(taps) == measure.count(self.arch), axis.name
            for index, tap in enumerate(taps):
                number = layers.index(layer.layer_number - 1)
                samples = self._samples(axis, number)
                listeners.append(Listener(axis, measure, (number, index), tap, samples))
        return listeners

    def _layers_of(self, axis: Axis) -> Sequence[int]:
        """Return the layers in which an axis is measured, numbers from 0."""
        kind = axis.name if axis.name in KINDS else axis.kind
        return range(self.arch.num_layers) if kind is None else self.arch.layers_of(kind)

    def _samples(self, axis: Axis, number: int) -> OverSamples:
        measure, tp = MEASURES[axis.name], self.groups.tp
        position_groups = [self.groups.cp]
        if self.sequence_parallel and not measure.tp_split:
            position_groups.append(tp)
        return OverSamples(
            num_units=self._width(axis, number) // (tp.size() if measure.tp_split else 1),
            sequence="mean" if measure.of_layer else self.aggregation.sequence,
            position_groups=[group for group in position_groups if group.size() > 1],
            device=self.device,
        )

    def _width(self, axis: Axis, number: int) -> int:
        """Return how many numbers an axis aggregates of a tap of one layer, from 0 in its kind.

        Experts x units x numbers of a unit, in this order: a TP rank's share is one slice.
        """
        measure = MEASURES[axis.name]
        units = 1 if measure.of_layer else axis.length(self.arch, number)
        experts = self.arch.num_experts if axis.scope == "expert" else 1
        return experts * units * measure.numbers(self.arch, self.aggregation)

    def collect(self) -> dict[str, Tensor]:
        """Return the scores of the whole model, the same on every rank. Three collectives.

        Every rank fills in its own cells of the whole model's totals; the sum over all ranks is
        then the result, whatever the layout.

        Returns:
            Float32 vectors on the CPU under the names of ``pruning.scores``.

        Raises:
            UserError: on every rank; no sample has passed, or activations were NaN or infinite.
        """
        # Per axis and layer [taps, 3, c]: the two sums of ``OverSamples`` and its count.
        shapes = {
            (axis.name, number): (
                MEASURES[axis.name].count(self.arch),
                3,
                self._width(axis, number),
            )
            for axis in self.axes
            for number in range(len(self._layers_of(axis)))
        }
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        flat = torch.zeros(sum(sizes), dtype=torch.float64, device=self.device)
        parts = zip(shapes, flat.split(sizes), strict=True)
        totals = {place: part.view(shapes[place]) for place, part in parts}
        if self.groups.cp.rank() == 0:  # the others hold the same
            self._fill(totals)
        # Samples first: what tp and pp then add to a sum are zeros, which leaves the same bits on
        # every rank.
        for group in (self.groups.dp_cp, self.groups.tp, self.groups.pp):
            torch.distributed.all_reduce(flat, group=group)
        totals = {place: total.cpu() for place, total in totals.items()}
        _check(totals, {axis.name: self._layers_of(axis) for axis in self.axes})
        return self._scores(totals)

    def _fill(self, totals: Mapping[tuple[str, int], Tensor]) -> None:
        """Write this rank's sums into ``totals``; what all of tp hold, its first rank writes."""
        tp_rank = self.groups.tp.rank()
        for listener in self.listeners:
            (number, index), samples = listener.row, listener.samples
            cell = totals[listener.axis.name, number][index]
            if listener.measure.tp_split:
                width = samples.sums.size(1)
                cell = cell[:, tp_rank * width : (tp_rank + 1) * width]
            elif tp_rank != 0:
                continue
            cell[:2], cell[2] = samples.sums, samples.count

    def _scores(self, totals: Mapping[tuple[str, int], Tensor]) -> dict[str, Tensor]:
        rows = [row for axis in self.axes for row in self._rows(axis, totals)]
        return dict(zip(lengths(self.arch), rows, strict=True))

    def _rows(self, axis: Axis, totals: Mapping[tuple[str, int], Tensor]) -> list[Tensor]:
        """Return the scores of an axis, a vector of [units] float32 after the other."""
        numbers = range(len(self._layers_of(axis)))
        layers = [self._layer_scores(axis, number, totals[axis.name, number]) for number in numbers]
        if axis.scope == "model":
            whole = torch.stack(layers)  # [layers, taps, units]
            of_layer = MEASURES[axis.name].of_layer
            # Channels of the residual stream are the same units in all layers: their scores add up.
            return [whole.sum(dim=1).flatten().float() if of_layer else whole.sum((0, 1)).float()]
        return [
            vector.float()
            for number, scores in zip(numbers, layers, strict=True)
            for vector in scores.sum(dim=0).view(-1, axis.num_scores(self.arch, number))
        ]

    def _layer_scores(self, axis: Axis, number: int, total: Tensor) -> Tensor:
        """Return [taps, c]: the scores of one layer's units, of each expert after the other."""
        measure = MEASURES[axis.name]
        *sums, count = total.unbind(dim=1)  # [taps, c] each
        batch = "mean" if measure.of_layer else self.aggregation.batch
        return measure.scores(aggregate(batch, sums, count), self.arch.at(axis.kind, number))


@torch.no_grad()
def _sums_in_blocks(
    tap: Tap, sequence: str, tensors: Sequence[Tensor], left_out: Tensor | None
) -> Tensor:
    """Return ``sums_over_positions`` of the values of ``tap``, made of some positions at a time."""
    at_once = max(1, BLOCK_NUMEL[tensors[0].device.type] // tensors[0][0].numel())
    blocks = list(zip(*(x.split(at_once) for x in tensors), strict=True))
    masks = [None] * len(blocks) if left_out is None else left_out.split(at_once)
    return sum(
        sums_over_positions(sequence, tap.values(*block), mask)
        for block, mask in zip(blocks, masks, strict=True)
    )


def _check(totals: Mapping[tuple[str, int], Tensor], layers: Mapping[str, Sequence[int]]) -> None:
    bad = []
    for (axis, number), total in totals.items():
        if total[:, 2].min() == 0:
            raise UserError(
                "no calibration sample passed through the model: see --calibration-samples."
            )
        bad += [(layers[axis][number], axis)] * (not total.isfinite().all())
    if bad:
        layer, axis = min(bad)  # later layers only propagate what is not finite
        raise UserError(
            f"layer {layer} (from 0): activations that score the axis {axis!r} are NaN or "
            "infinite: check the weights under --load and the dtype."
        )
