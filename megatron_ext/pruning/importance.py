"""Importance from activations: what each hook sees, what it keeps, which ranks must agree on it.

Shape letters in this file:
    S  full sequence     s  positions on this rank     n  sample, over the whole calibration set
    C  units of an axis  c  units on this rank         B  micro-batch      H  hidden_size

How scores lie over the ranks follows from the tensor that a hook taps:

    axis     tapped tensor                         shape       units       positions
    ffn      input of mlp.linear_fc2               [S, B, c]   TP-split    whole
    heads    input of self_attention.linear_proj   [S, B, c*D] TP-split    whole (D: kv_channels)
    hidden   output of both norms of a layer       [s, B, H]   whole       TP-split under SP
    layers   input and output of a layer           [s, B, H]   whole       TP-split under SP
    under context parallelism                      as above    as above    also CP-split

Positions of one sample are summed over ranks before anything is squared. Samples, stages and split
units come together once, in ``Importance.collect``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from megatron_ext.arch import Arch
from megatron_ext.errors import UserError

AGGREGATION = "batch=l2,seq=mean"
TP_SPLIT_AXES = ("ffn", "heads")

# Elements that a hook turns into float32 at a time, 16 MiB: enough to fill a GPU, and no float32
# copy of a whole activation.
BLOCK_NUMEL = 2**22

# (input [s, B, ...], output [s, B, ...]) of a module -> sums over its positions, [B, c] float32.
PositionSums = Callable[[Tensor, Tensor], Tensor]


class MeansOverPositions:
    """Sum over samples of a power of the mean over positions.

        total[c] = sum_n ( 1/S * sum_s a[s, n, c] ) ** power

    With power 2 its root is the (batch = L2, sequence = mean) of Minitron (arXiv:2407.14679).

    The power is outside the mean: ranks that hold other positions of the same sample are added
    before it. Adding finished totals instead would raise no error and give wrong numbers.
    """

    def __init__(
        self, num_units: int, power: int, position_groups: Sequence[ProcessGroup], device: Any
    ):
        """Start with no samples.

        Args:
            num_units: c, the units on this rank.
            power: of the mean, 1 or 2.
            position_groups: together, the ranks that hold the other positions of the same samples.
            device: where the model runs.
        """
        # float32 is enough: one number of similar size is added per sample, some thousands.
        self.total = torch.zeros(num_units, dtype=torch.float32, device=device)  # [c]
        self.num_samples = 0
        self.power = power
        self.position_groups = position_groups

    def add(self, position_sums: Tensor, num_positions: int) -> None:
        """Add the samples of one micro-batch. One collective per position group.

        Args:
            position_sums: [B, c] float32, over this rank's positions. Overwritten.
            num_positions: s; Megatron splits evenly, so S is s times the number of ranks.
        """
        for group in self.position_groups:
            num_positions *= group.size()
            torch.distributed.all_reduce(position_sums, group=group)
        self.total += (position_sums / num_positions).pow(self.power).sum(dim=0)
        self.num_samples += len(position_sums)


@dataclass(frozen=True)
class Tap:
    """A module that is listened to, what is taken from it, and where that belongs."""

    module: nn.Module
    position_sums: PositionSums
    accumulator: MeansOverPositions
    axis: str
    row: tuple[int, int]
    """(layer, tap of this axis in the layer), global numbers from 0."""

    def attach(self) -> RemovableHandle:
        """Feed the accumulator from every forward pass of the module."""

        @torch.no_grad()
        def hook(_: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            self.accumulator.add(self.position_sums(before, after), len(before))

        return self.module.register_forward_hook(hook, with_kwargs=True)


class Importance:
    """Scores every axis of a model in the same forward passes; outputs and gradients stay as is.

    Use: ``with importance.attached():`` run forward passes, each sample on one data-parallel rank;
    then ``importance.collect()``. Recomputed forward passes would count twice: do not run backward.
    """

    def __init__(
        self,
        model_chunks: Sequence[MegatronModule],
        arch: Arch,
        groups: ProcessGroupCollection,
        *,
        sequence_parallel: bool,
    ):
        """Prepare the taps of this rank's layers. No collectives.

        Args:
            model_chunks: this rank's part of the model, wrapped (DDP, Float16Module) or not.
            arch: sizes of the whole model.
            groups: megatron-core's tp, pp, cp and dp_cp.
            sequence_parallel: whether norms see positions split over ``groups.tp``.
        """
        self.arch, self.groups = arch, groups
        self.sequence_parallel = sequence_parallel
        self.device = next(model_chunks[0].parameters()).device
        # All taps share this memory: allocating it anew would cost more than the sums.
        self.scratch = [torch.empty(0, dtype=torch.float32, device=self.device) for _ in range(2)]
        self.taps = [
            tap
            for chunk in model_chunks
            for layer in unwrap_model(chunk).decoder.layers
            for tap in self._taps_of(layer)
        ]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach all taps and detach them on exit, also after an error."""
        handles = [tap.attach() for tap in self.taps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _taps_of(self, layer: nn.Module) -> list[Tap]:
        attention, mlp = layer.self_attention, layer.mlp
        rows: list[tuple[str, int, nn.Module, PositionSums]] = [
            ("ffn", 0, mlp.linear_fc2, lambda x, _: self._channels(x)),
            ("heads", 0, attention.linear_proj, lambda x, _: self._heads(x)),
            ("hidden", 0, *self._norm(layer.input_layernorm, attention.linear_qkv)),
            ("hidden", 1, *self._norm(layer.pre_mlp_layernorm, mlp.linear_fc1)),
            ("layers", 0, layer, self._change),
        ]
        return [
            Tap(module, sums, self._accumulator(axis), axis, (layer.layer_number - 1, index))
            for axis, index, module, sums in rows
        ]

    def _accumulator(self, axis: str) -> MeansOverPositions:
        split_units = axis in TP_SPLIT_AXES
        position_groups = [self.groups.cp]
        if self.sequence_parallel and not split_units:
            position_groups.append(self.groups.tp)
        return MeansOverPositions(
            num_units=_units(self.arch)[axis] // (self.groups.tp.size() if split_units else 1),
            power=1 if axis == "layers" else 2,
            position_groups=[group for group in position_groups if group.size() > 1],
            device=self.device,
        )

    def _norm(self, norm: nn.Module, linear: nn.Module) -> tuple[nn.Module, PositionSums]:
        """Return the module to listen to for the output of a norm, and what to take from it.

        Transformer Engine norms inside the linear layer that follows; ``norm`` is an IdentityOp
        then, and the norm is computed a second time from the input of ``linear``.
        """
        if isinstance(norm, IdentityOp):
            return linear, lambda x, _: self._channels(_norm_of(linear, x))
        return norm, lambda _, y: self._channels(y)

    def _channels(self, x: Tensor) -> Tensor:
        """Return sum_s |x|, [B, C] float32, of [s, B, C]."""
        return sum(block.abs_().sum(dim=0) for (block,) in self._blocks(x))

    def _heads(self, x: Tensor) -> Tensor:
        """Return sum_s of the L2 norm of each head, [B, c] float32, of [s, B, c * D]."""
        heads = x.unflatten(-1, (-1, self.arch.kv_channels))
        return torch.linalg.vector_norm(heads, dim=-1, dtype=torch.float32).sum(dim=0)

    def _change(self, before: Tensor, after: Tensor) -> Tensor:
        """Return sum_s (1 - cos(before, after)), [B, 1] float32, of two [s, B, H]."""
        return sum(_one_minus_cosine(x, y).sum(dim=0) for x, y in self._blocks(before, after))

    def _blocks(self, *tensors: Tensor) -> Iterator[list[Tensor]]:
        """Yield ``tensors`` [s, B, C] in blocks of positions, as float32 copies to overwrite."""
        num_positions = max(1, BLOCK_NUMEL // tensors[0][0].numel())
        for parts in zip(*(x.split(num_positions) for x in tensors), strict=True):
            yield [self._copy(number, x) for number, x in enumerate(parts)]

    def _copy(self, number: int, x: Tensor) -> Tensor:
        """Return ``x`` as float32 in shared buffer ``number``, which grows as needed."""
        if self.scratch[number].numel() < x.numel():
            self.scratch[number] = self.scratch[number].new_empty(x.numel())
        return self.scratch[number][: x.numel()].view(x.shape).copy_(x)

    def collect(self) -> dict[str, Tensor]:
        """Return the scores of the whole model, the same on every rank. Three collectives.

        Every rank fills in its own cells of the whole model's totals and sample counts; the sum
        over all ranks is then the result, whatever the layout.

        Returns:
            Float32 vectors on the CPU under the names of ``pruning.scores``.

        Raises:
            UserError: on every rank; no sample has passed, or activations were NaN or infinite.
        """
        # Per axis [layers, taps, units + 1]; the last column counts samples.
        shapes = {
            axis: (self.arch.num_layers, 2 if axis == "hidden" else 1, units + 1)
            for axis, units in _units(self.arch).items()
        }
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        flat = torch.zeros(sum(sizes), dtype=torch.float32, device=self.device)
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
        return _scores(totals)

    def _fill(self, totals: Mapping[str, Tensor]) -> None:
        """Write this rank's sums into ``totals``; what all of tp hold, its first rank writes."""
        tp_rank = self.groups.tp.rank()
        for tap in self.taps:
            cell, mine = totals[tap.axis][tap.row], tap.accumulator.total
            if tp_rank == 0:
                cell[-1] = tap.accumulator.num_samples
            if tap.axis in TP_SPLIT_AXES:
                cell[tp_rank * len(mine) : (tp_rank + 1) * len(mine)] = mine
            elif tp_rank == 0:
                cell[:-1] = mine


def _one_minus_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Return 1 - cos over the last dim, [..., 1]. Overwrites ``x``."""
    lengths = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
    cosine = x.mul_(y).sum(dim=-1) / lengths.clamp_min_(1e-12)
    # A layer that changes nothing must not score below 0 by rounding.
    return (1 - cosine).clamp_(0, 2).unsqueeze(-1)


def _units(arch: Arch) -> dict[str, int]:
    """Return the units per layer of every axis."""
    return {
        "ffn": arch.ffn_hidden_size,
        "heads": arch.num_attention_heads,
        "hidden": arch.hidden_size,
        "layers": 1,
    }


def _norm_of(linear: nn.Module, x: Tensor) -> Tensor:
    """Return the norm inside a Transformer Engine LayerNormLinear, [s, B, H] in and out."""
    weight = linear.layer_norm_weight + (1 if linear.zero_centered_gamma else 0)
    if linear.normalization == "RMSNorm":
        return F.rms_norm(x, weight.shape, weight, linear.eps)
    return F.layer_norm(x, weight.shape, weight, linear.layer_norm_bias, linear.eps)


def _check(totals: Mapping[str, Tensor]) -> None:
    for axis, total in totals.items():
        if total[..., -1].min() == 0:
            raise UserError(
                "no calibration sample passed through the model: see --calibration-samples."
            )
        finite = total.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            layer = int(finite.int().argmin())
            raise UserError(
                f"layer {layer} (from 0): activations that score the axis {axis!r} are NaN or "
                "infinite: check the weights under --load and the dtype."
            )


def _scores(totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    root = {axis: total[..., :-1].sqrt() for axis, total in totals.items()}
    vectors = {
        "hidden": root["hidden"].sum(dim=(0, 1)),
        "layers": (totals["layers"][..., 0] / totals["layers"][..., 1]).flatten(),
    }
    for axis in ("ffn", "heads"):
        vectors |= {f"{axis}.{layer}": row for layer, (row,) in enumerate(root[axis])}
    return vectors
