"""Losses between hidden states of teacher and student, on whichever stage and rank they are.

Shape letters in this file:
    s  positions on this rank     H  hidden size, student
    b  micro-batch                T  hidden size, teacher

    L_is = sum over pairs of the mean over tokens of Loss(W norm(h_s), norm(h_t))

(arXiv:2407.14679, section 3.) States are those of the residual stream, or what attention adds to it
(``pairs``), normalised as the student's norms do, without weights: the norm that follows may be on
the next stage, and it is trained. W, with other widths only, is one linear map for all pairs, or
one for each, trained with the student.

A stage that is not the last cannot return a loss. It adds the gradient where it belongs: the
state passes through a function that hands it on and gives the loss its gradient in backward, as
megatron-core does for the load-balancing loss. Hidden-state losses are sums over tokens, as all
losses here.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_ext.distillation.losses import HIDDEN_LOSS, KD_LOSS
from megatron_ext.distillation.pairs import ATTENTION, BLOCK, EMBEDDING, MLP, HiddenStates, Pair
from megatron_ext.model.build import LanguageModel
from megatron_ext.runtime.errors import USAGE, UserError

PREFIX = "distillation.projection."  # of tensors in a checkpoint


def normalised(x: Tensor, normalization: str, epsilon: float) -> Tensor:
    """Return [s, b, H] normalised over channels, without weights; float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if normalization == "RMSNorm":
        return F.rms_norm(x, x.shape[-1:], eps=epsilon)
    return F.layer_norm(x, x.shape[-1:], eps=epsilon)


def distance(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss per token [s, b] of two states [s, b, T]."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().mean(dim=-1)


class _WithLoss(torch.autograd.Function):
    """Hands ``x`` on; in backward gives ``loss`` the gradient ``scale``, a tensor."""

    @staticmethod
    def forward(ctx, x, loss, scale):
        ctx.scale, ctx.dtype = scale, loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, ctx.scale.to(ctx.dtype), None


class Maps(nn.ParameterDict):
    """Maps from the student's width to the teacher's, [T, H] by name.

    Called as a module is: under --overlap-param-gather megatron-core waits for a module's
    parameters before its forward pass, and for those of a module that is never called not at all.
    """

    __call__ = nn.Module.__call__  # a ParameterDict refuses

    def forward(self, name: str, x: Tensor) -> Tensor:
        """Return [s, b, T] of [s, b, H], in the dtype of the maps."""
        weight = self[name]
        return F.linear(x.to(weight.dtype), weight)


class HiddenLoss(nn.Module):
    """The losses of the pairs that lie on one pipeline stage, or one virtual stage of it."""

    def __init__(
        self,
        states: HiddenStates,
        student: LanguageModel,
        teacher: LanguageModel,
        tp_group: ProcessGroup,
    ):
        """Hook both models; no collectives.

        Raises:
            UserError: on the ranks concerned; a pair's layers lie on different stages.
        """
        super().__init__()
        self.states, self.config, self.tp_group = states, student.config, tp_group
        self.pairs = [pair for pair in states.pairs if _is_here(pair, student, teacher)]
        self.maps = Maps()
        self.widths = teacher.config.hidden_size, student.config.hidden_size
        if self.widths[0] != self.widths[1]:
            for name in dict.fromkeys(map(self._map_of, self.pairs)):
                self.maps[name] = self._new_map(name)
        self.scale = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
        """Gradient of the sum of all losses: alpha times the optimizer's loss scale. On the device,
        where a captured step reads it anew."""
        self.total = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
        """Sum over tokens since it was last taken, of this rank's positions."""
        self.loss_mask: Tensor | None = None
        seen: dict[Pair, Tensor] = {}
        for pair in self.pairs:
            _tap(teacher, pair.kind, pair.teacher, _keep(seen, pair))
            _tap(student, pair.kind, pair.student, self._compare(seen, pair))

    def expect(self, loss_mask: Tensor) -> None:
        """Say which positions of the next micro-batch count.

        ``loss_mask``: [b, s * tp under sequence parallelism, else s], of this cp rank.
        """
        mask = loss_mask.T
        if self.config.sequence_parallel:
            mask = mask.chunk(self.tp_group.size())[self.tp_group.rank()]
        self.loss_mask = mask

    def _compare(self, seen: dict[Pair, Tensor], pair: Pair) -> Callable[[Tensor], Tensor]:
        normalization, epsilon = self.config.normalization, self.config.layernorm_epsilon
        waiting: deque[tuple[Tensor, Tensor]] = deque()

        def compare(x: Tensor) -> Tensor:
            if self.training and not torch.is_grad_enabled():
                # First pass of a layer that is recomputed in backward. The teacher's state and
                # the mask wait in a queue: when the layer runs again, with gradients, the teacher
                # may be several micro-batches ahead, and the oldest entry is the layer's.
                waiting.append((seen.pop(pair), self.loss_mask))
                return x
            teacher, mask = waiting.popleft() if waiting else (seen.pop(pair), self.loss_mask)
            teacher = normalised(teacher, normalization, epsilon)  # [s, b, T]
            student = normalised(x, normalization, epsilon)  # [s, b, H]
            if self.maps:
                student = self.maps(self._map_of(pair), student).to(teacher.dtype)  # [s, b, T]
            loss = distance(self.states.loss, student, teacher)
            loss = (loss * mask).sum()
            self.total += loss.detach()
            return _WithLoss.apply(x, loss, self.scale)

        return compare

    def _map_of(self, pair: Pair) -> str:
        return "shared" if self.states.projection == "shared" else str(pair).replace(":", "-")

    def _new_map(self, name: str) -> nn.Parameter:
        """Return a map [T, H] that puts every kept channel in its place, or a random one."""
        weight, (_, width) = torch.zeros(self.widths, dtype=torch.float32), self.widths
        if self.states.kept_channels is not None:
            weight[list(self.states.kept_channels), range(width)] = 1
        else:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
            weight.normal_(std=width**-0.5, generator=torch.Generator().manual_seed(seed))
        device = torch.cuda.current_device()
        parameter = nn.Parameter(weight.to(device, self.config.params_dtype))
        # Read by megatron-core: gradients of the positions of tensor-parallel ranks are added.
        parameter.sequence_parallel = self.config.sequence_parallel
        if self.states.projection == "shared":
            # A bucket of its own, so that all stages split it alike over data-parallel ranks.
            parameter.shared_embedding = True
        return parameter


def _is_here(pair: Pair, student: LanguageModel, teacher: LanguageModel) -> bool:
    if pair.kind == EMBEDDING:
        return student.pre_process
    here = [
        any(layer.layer_number - 1 == number for layer in model.decoder.layers)
        for model, number in ((student, pair.student), (teacher, pair.teacher))
    ]
    if here[0] != here[1]:
        raise UserError(
            f"--kd-hidden-states {pair}: layer {pair.teacher} of the teacher and layer "
            f"{pair.student} of the student are on different pipeline stages.",
            USAGE,
        )
    return here[0]


def _keep(seen: dict[Pair, Tensor], pair: Pair) -> Callable[[Tensor], Tensor]:
    def keep(x: Tensor) -> Tensor:
        # In evaluation megatron-core adds the residual stream to this output in place.
        seen[pair] = x.clone() if pair.kind == ATTENTION else x
        return x

    return keep


def _tap(
    model: LanguageModel, kind: str, number: int | None, act: Callable[[Tensor], Tensor]
) -> None:
    """Replace a state of ``model`` by what ``act`` makes of it, in every forward pass."""

    def on_output(_: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (act(output[0]), *output[1:])
        return act(output)

    def on_sum(_: nn.Module, args: Any, output: tuple[Tensor, Tensor | None]) -> tuple:
        """Add the bias of the projection, which megatron-core leaves to what comes behind."""
        x, bias = output
        return act(x if bias is None else x + bias), None

    def on_input(_: nn.Module, args: tuple) -> tuple:
        return (act(args[0]), *args[1:])

    if kind == EMBEDDING:
        model.embedding.register_forward_hook(on_output)
        return
    (layer,) = (layer for layer in model.decoder.layers if layer.layer_number - 1 == number)
    if kind == MLP:
        layer.pre_mlp_layernorm.register_forward_pre_hook(on_input)
    else:
        module = layer if kind == BLOCK else layer.self_attention
        module.register_forward_hook(on_output if kind == BLOCK else on_sum)


class HiddenLosses:
    """The hidden-state losses of a run on this rank, and the maps that they train. May be none.

    Their weight alpha is a constant, or L_logits / L_is of the step before: of whole global
    batches, so that it depends neither on micro-batches nor on the layout; the losses of a step are
    known only when its gradients are.
    """

    def __init__(
        self,
        chunks: Sequence[HiddenLoss],
        groups: ProcessGroupCollection | None,
        constant: float | None,
    ):
        """Collective over pp: which chunk counts a shared map in the gradient norm.

        Args:
            chunks: one per virtual stage of this rank; none without such losses, on any rank.
            groups: megatron-core's tp, pp and dp_cp.
            constant: alpha, above 0; None takes it from the losses of each step before.
        """
        self.chunks, self.groups, self.constant = chunks, groups, constant
        self.ratio: float | None = None
        """L_logits / L_is of the step before; 0 where the states were equal."""
        self.has_map = False
        if not chunks:
            return
        places: list[Any] = [None] * groups.pp.size()
        own = [index for index, chunk in enumerate(chunks) if "shared" in chunk.maps]
        torch.distributed.all_gather_object(places, own, group=groups.pp)
        self.has_map = any(places)
        owner = next((rank for rank, indices in enumerate(places) if indices), None)
        for index in own:
            is_owner = groups.pp.rank() == owner and index == own[0]
            # Read by megatron-core's gradient norm.
            chunks[index].maps["shared"].shared = not is_owner

    @property
    def alpha(self) -> float | None:
        """The weight in the next step; None: of losses that no pass has measured yet."""
        return self.constant or self.ratio if self.chunks else 0.0

    def begin(self, scale: float) -> None:
        """Set the gradient of the sum of all losses and forget what was summed."""
        for chunk in self.chunks:
            chunk.scale.fill_(scale)
            chunk.total.zero_()

    def report(self, num_tokens: float) -> dict[str, float]:
        """Return L_is of the passes since ``begin``, on every rank. Two or three collectives."""
        if not self.chunks:
            return {}
        total = torch.stack([chunk.total for chunk in self.chunks]).sum()
        groups = [self.groups.dp_cp, self.groups.pp]
        if self.chunks[0].config.sequence_parallel:
            groups.append(self.groups.tp)
        for group in groups:
            torch.distributed.all_reduce(total, group=group)
        return {HIDDEN_LOSS: total.item() / max(num_tokens, 1.0)}

    def adapt(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Weigh the next step by the losses of this one; return the weight that this one had."""
        if not self.chunks:
            return {}
        before, states = self.alpha, losses[HIDDEN_LOSS]
        self.ratio = losses[KD_LOSS] / states if states else 0.0
        return {"alpha": before}

    def finish_gradients(self) -> None:
        """Give every stage the sum of the shared map's gradients. One collective over pp."""
        if not self.has_map:
            return
        maps = [chunk.maps["shared"] for chunk in self.chunks if "shared" in chunk.maps]
        device = torch.cuda.current_device()
        total = torch.zeros(self.chunks[0].widths, dtype=torch.float64, device=device)
        for parameter in maps:
            total += parameter.main_grad
        torch.distributed.all_reduce(total, group=self.groups.pp)
        for parameter in maps:
            parameter.main_grad.copy_(total)

    def sharded_state(self) -> dict[str, dict[str, ShardedTensor]]:
        """Return the maps as megatron-core's sharded tensors, ``distillation.projection.*``."""
        groups, state = self.groups, {}
        for index, chunk in enumerate(self.chunks):
            for name, parameter in chunk.maps.items():
                is_copy = name == "shared" and parameter.shared
                stage = 1 + groups.pp.rank() * len(self.chunks) + index if is_copy else 0
                state[f"{name} {index}"] = ShardedTensor.from_rank_offsets(
                    f"{PREFIX}{name}",
                    parameter,
                    replica_id=(stage, groups.tp.rank(), groups.dp_cp.rank()),
                )
        return {"distillation": state} if self.chunks else {}

    @torch.no_grad()
    def load(self, loaded: Mapping[str, Any], ratio: float | None) -> None:
        """Take the maps that were read for ``sharded_state``, and the ``ratio`` that was saved."""
        if not self.chunks:
            return
        for index, chunk in enumerate(self.chunks):
            for name, parameter in chunk.maps.items():
                parameter.copy_(loaded["distillation"][f"{name} {index}"])
        self.ratio = ratio


NO_HIDDEN_LOSSES = HiddenLosses((), None, None)
