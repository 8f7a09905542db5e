"""Importance from activations: what each hook sees, what it keeps, which ranks must agree on it.

Shape letters in this file:
    S  full sequence     s  positions on this rank     n  sample, over the whole calibration set
    C  units of an axis  c  units on this rank         B  micro-batch      H  hidden_size

How scores lie over the ranks follows from the tensor that a hook taps:

    axis     tapped tensor                         shape       units       positions
    ffn      input of mlp.linear_fc2               [S, B, c]   TP-split    whole
      pre    output of mlp.linear_fc1, the gate's  [S, B, c]   TP-split    whole
    heads    input of self_attention.linear_proj   [S, B, c*D] TP-split    whole (D: kv_channels)
    hidden   output of both norms of a layer       [s, B, H]   whole       TP-split under SP
    layers   input and output of a layer           [s, B, H]   whole       TP-split under SP
    under context parallelism                      as above    as above    also CP-split

    in a mixture of experts, instead of ffn (the first two: see ``pruning.experts``)
    experts     output of an expert's linear_fc2   [n, H]      n tokens of any rank of tp x ep
    moe_ffn     its input; pre: as above           [n, c]
    shared_ffn  the shared experts': as ffn        [S, B, c]   TP-split    whole

Positions of one sample are summed over ranks before they are aggregated. Samples, stages and split
units come together once, in ``Importance.collect``. A layer's score is 1 - cos(input, output), a
mean over positions whatever the aggregation of the other axes.

Positions with loss mask 0, the padding of a sample, take no part: a sample of 100 tokens and 28 of
padding is a sample of 100 positions. Several documents in one sample need nothing more: each of
their tokens is what the model is trained on, and a sample remains the unit of data. Whether they
see each other is the model's attention mask (--reset-attention-mask), which acts before any hook.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_ext.arch import Arch
from megatron_ext.pruning import native
from megatron_ext.pruning.aggregation import (
    DEFAULT,
    Aggregation,
    OverSamples,
    aggregate,
    sums_over_positions,
)
from megatron_ext.pruning.experts import DispatchedSums, ExpertTap, gather_left_out
from megatron_ext.pruning.taps import (
    Tap,
    first_input,
    input_and_output,
    itself,
    norm_output,
    one_minus_cosine,
)
from megatron_ext.runtime.errors import UserError

TP_SPLIT_AXES = ("ffn", "heads", "shared_ffn")

# Elements that a hook works on at a time in torch. On a CPU their float32 copies stay in the cache
# of a core (tools/bench/calibration.py); a GPU needs more to be busy.
BLOCK_NUMEL = {"cpu": 2**18, "cuda": 2**22}


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
        self.taps = [
            tap
            for chunk in model_chunks
            for layer in unwrap_model(chunk).decoder.layers
            for tap in self._taps_of(layer)
        ]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach all taps and detach them on exit, also after an error."""
        handles = []
        for tap in self.taps:
            attach = self._attach_experts if isinstance(tap, ExpertTap) else self._attach
            handles += attach(tap)
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
        # A GPU is not asked whether there are any: it would have to finish all before.
        some = left_out.is_cuda or left_out.any()
        self.left_out = left_out.T.contiguous() if some else None  # [s, B]
        self.num_positions = counts.clamp_min(1).unsqueeze(-1)  # [B, 1]
        # A layer's score is a mean over positions, the others' over samples that have any.
        self.weights = {axis: (counts > 0).double() for axis in self._widths()} | {"layers": counts}
        if self.arch.num_experts is not None:
            split = self.groups.tp.size() if self.sequence_parallel else 1
            self.left_out_everywhere = gather_left_out(loss_mask, self.groups, split)

    def _attach(self, tap: Tap) -> list[RemovableHandle]:
        def hook(_: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            self._add(tap, tap.tensors(before, output))

        return [tap.module.register_forward_hook(hook, with_kwargs=True)]

    def _attach_experts(self, tap: ExpertTap) -> list[RemovableHandle]:
        """Sum what the experts see while their layer runs; count its samples when it has run."""
        running: list[DispatchedSums] = []

        def begin(_: nn.Module, args: Any) -> None:
            running.append(DispatchedSums(tap, self.groups, self.left_out_everywhere))

        def add_of(expert: int) -> Callable:
            @torch.no_grad()
            def add(_: nn.Module, args: tuple, output: Any) -> None:
                running[0].add(expert, tap.values(args[0], output, self.groups))

            return add

        @torch.no_grad()
        def finish(_: nn.Module, args: Any, output: Any) -> None:
            sums = running.pop().sent_home()
            tap.samples.add(sums, self.num_positions, self.weights[tap.axis])

        return [
            tap.mlp.register_forward_pre_hook(begin),
            *(module.register_forward_hook(add_of(expert)) for expert, module in tap.modules()),
            tap.mlp.register_forward_hook(finish),
        ]

    def _add(self, tap: Tap, tensors: Sequence[Tensor]) -> None:
        """Sum the values of ``tap`` over this rank's positions."""
        left_out = self.left_out
        if left_out is not None and self.sequence_parallel and tap.axis not in TP_SPLIT_AXES:
            left_out = left_out.chunk(self.groups.tp.size())[self.groups.tp.rank()]
        sums = tap.sums(tap.samples.sequence, tensors, left_out)
        if sums is None:
            sums = _sums_in_blocks(tap, tensors, left_out)
        tap.samples.add(sums, self.num_positions, self.weights[tap.axis])

    def _taps_of(self, layer: nn.Module) -> list[Tap | ExpertTap]:
        attention, number = layer.self_attention, layer.layer_number - 1
        units, changes = (itself, native.unit_sums), (one_minus_cosine, native.change_sums)
        heads = self._head_norms, partial(native.head_sums, channels=self.arch.kv_channels)
        if self.aggregation.heads == "aggregate-first":
            heads = units
        rows = [
            *self._neurons(layer.mlp),
            ("heads", 0, attention.linear_proj, first_input, *heads),
            ("hidden", 0, *norm_output(layer.input_layernorm, attention.linear_qkv), *units),
            ("hidden", 1, *norm_output(layer.pre_mlp_layernorm, layer.mlp), *units),
            ("layers", 0, layer, input_and_output, *changes),
        ]
        taps: list[Tap | ExpertTap] = [
            Tap(axis, (number, index), *rest, self._samples(axis)) for axis, index, *rest in rows
        ]
        if self.arch.num_experts is None:
            return taps
        pre = self.aggregation.neurons == "pre"
        taps += [
            ExpertTap("experts", (number, 0), layer.mlp, False, self._samples("experts")),
            ExpertTap("moe_ffn", (number, 0), layer.mlp, pre, self._samples("moe_ffn")),
        ]
        return taps

    def _neurons(self, mlp: nn.Module) -> list[tuple]:
        """Return the row of the neurons that every token passes, if there are any."""
        axis = "ffn"
        if self.arch.num_experts is not None:
            if self.arch.moe_shared_expert_intermediate_size is None:
                return []
            axis, mlp = "shared_ffn", mlp.shared_experts
        if self.aggregation.neurons == "pre":
            return [(axis, 0, mlp.linear_fc1, self._gate, itself, native.unit_sums)]
        return [(axis, 0, mlp.linear_fc2, first_input, itself, native.unit_sums)]

    def _samples(self, axis: str) -> OverSamples:
        split_units = axis in TP_SPLIT_AXES
        position_groups = [self.groups.cp]
        if self.sequence_parallel and not split_units:
            position_groups.append(self.groups.tp)
        return OverSamples(
            num_units=self._widths()[axis] // (self.groups.tp.size() if split_units else 1),
            sequence="mean" if axis == "layers" else self.aggregation.sequence,
            position_groups=[group for group in position_groups if group.size() > 1],
            device=self.device,
        )

    def _widths(self) -> dict[str, int]:
        """Return how many numbers per layer and tap every axis aggregates."""
        arch, by_channel = self.arch, self.aggregation.heads == "aggregate-first"
        widths = {
            "heads": arch.num_attention_heads * (arch.kv_channels if by_channel else 1),
            "hidden": arch.hidden_size,
            "layers": 1,
        }
        if arch.num_experts is None:
            return {"ffn": arch.ffn_hidden_size, **widths}
        widths |= {"experts": arch.num_experts}
        widths |= {"moe_ffn": arch.num_experts * arch.moe_ffn_hidden_size}
        if arch.moe_shared_expert_intermediate_size is not None:
            widths |= {"shared_ffn": arch.moe_shared_expert_intermediate_size}
        return widths

    def _gate(self, _: Tensor, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor]:
        """Return what goes into the activation function; of fc1 [gate ; up] the gate."""
        x, bias = output
        x = x if bias is None else x + bias
        return (x.chunk(2, dim=-1)[0] if self.arch.swiglu else x,)

    def _head_norms(self, x: Tensor) -> Tensor:
        """Return the L2 norm of each head, [s, B, c] float32, of [s, B, c * D]."""
        # .float() and not dtype=: twice as fast from bfloat16 on CPUs.
        return torch.linalg.vector_norm(
            x.float().unflatten(-1, (-1, self.arch.kv_channels)), dim=-1
        )

    def collect(self) -> dict[str, Tensor]:
        """Return the scores of the whole model, the same on every rank. Three collectives.

        Every rank fills in its own cells of the whole model's totals; the sum over all ranks is
        then the result, whatever the layout.

        Returns:
            Float32 vectors on the CPU under the names of ``pruning.scores``.

        Raises:
            UserError: on every rank; no sample has passed, or activations were NaN or infinite.
        """
        # Per axis [layers, taps, 3, c]: the two sums of ``OverSamples`` and its count.
        shapes = {
            axis: (self.arch.num_layers, 2 if axis == "hidden" else 1, 3, width)
            for axis, width in self._widths().items()
        }
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        flat = torch.zeros(sum(sizes), dtype=torch.float64, device=self.device)
        parts = zip(shapes, flat.split(sizes), strict=True)
        totals = {axis: part.view(shapes[axis]) for axis, part in parts}
        if self.groups.cp.rank() == 0:  # the others hold the same
            self._fill(totals)
        # Samples first: what tp and pp then add to a sum are zeros, which leaves the same bits on
        # every rank.
        for group in (self.groups.dp_cp, self.groups.tp, self.groups.pp):
            torch.distributed.all_reduce(flat, group=group)
        totals = {axis: total.cpu() for axis, total in totals.items()}
        _check(totals)
        return self._scores(totals)

    def _fill(self, totals: Mapping[str, Tensor]) -> None:
        """Write this rank's sums into ``totals``; what all of tp hold, its first rank writes."""
        tp_rank = self.groups.tp.rank()
        for tap in self.taps:
            cell, mine = totals[tap.axis][tap.row], tap.samples.sums
            if tap.axis in TP_SPLIT_AXES:
                cell = cell[:, tp_rank * mine.size(1) : (tp_rank + 1) * mine.size(1)]
            elif tp_rank != 0:
                continue
            cell[:2], cell[2] = mine, tap.samples.count

    def _scores(self, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        finished = {}  # per axis [layers, taps, c]
        for axis, total in totals.items():
            *sums, count = total.unbind(dim=2)
            batch = "mean" if axis == "layers" else self.aggregation.batch
            finished[axis] = aggregate(batch, sums, count)
        heads = finished["heads"].unflatten(-1, (self.arch.num_attention_heads, -1))
        finished["heads"] = torch.linalg.vector_norm(heads, dim=-1)  # of one number: itself
        vectors = {
            "hidden": finished["hidden"].sum(dim=(0, 1)),
            "layers": finished["layers"].flatten(),
        }
        for axis in (*TP_SPLIT_AXES, "experts"):
            for layer, (row,) in enumerate(finished.get(axis, ())):
                vectors[f"{axis}.{layer}"] = row
        for layer, (row,) in enumerate(finished.get("moe_ffn", ())):
            for expert, neurons in enumerate(row.view(self.arch.num_experts, -1)):
                vectors[f"moe_ffn.{layer}.{expert}"] = neurons
        return {name: vector.float() for name, vector in vectors.items()}


@torch.no_grad()
def _sums_in_blocks(tap: Tap, tensors: Sequence[Tensor], left_out: Tensor | None) -> Tensor:
    """Return ``sums_over_positions`` of the values of ``tap``, made of some positions at a time."""
    at_once = max(1, BLOCK_NUMEL[tensors[0].device.type] // tensors[0][0].numel())
    blocks = list(zip(*(x.split(at_once) for x in tensors), strict=True))
    masks = [None] * len(blocks) if left_out is None else left_out.split(at_once)
    return sum(
        sums_over_positions(tap.samples.sequence, tap.values(*block), mask)
        for block, mask in zip(blocks, masks, strict=True)
    )


def _check(totals: Mapping[str, Tensor]) -> None:
    bad = []
    for axis, total in totals.items():
        if total[:, :, 2].min() == 0:
            raise UserError(
                "no calibration sample passed through the model: see --calibration-samples."
            )
        finite = total.isfinite().flatten(1).all(dim=1)
        bad += [(layer, axis) for layer in (~finite).nonzero().flatten().tolist()]
    if bad:
        layer, axis = min(bad)  # those above it only hand on what they are given
        raise UserError(
            f"layer {layer} (from 0): activations that score the axis {axis!r} are NaN or "
            "infinite: check the weights under --load and the dtype."
        )
