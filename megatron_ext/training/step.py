"""One optimizer step and one evaluation, through megatron-core's schedules.

Losses are sums over tokens until the very end: gradients and reported losses are divided once by
the number of unmasked tokens of the *global* batch, so that neither depends on how micro-batches
and sequences are spread over ranks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed import finalize_model_grads as core_finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_ext.distillation.hidden import NO_HIDDEN_LOSSES, HiddenLosses
from megatron_ext.distillation.stored import STORED
from megatron_ext.model import cuda_graphs

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The sizes of one step on this rank."""

    num_microbatches: int
    """Micro-batches per data-parallel rank."""
    micro_batch_size: int
    seq_length: int
    """Positions of a sample over all context-parallel ranks."""


@dataclass(frozen=True, kw_only=True)
class Wrapped:
    """A model as a step runs it, on this rank."""

    model: Sequence[MegatronModule]
    """Chunks, one per virtual stage: students, or each beside its teacher, or a model alone. What
    is trained has gradient buffers around it (``wrap``)."""
    groups: ProcessGroupCollection
    hidden: HiddenLosses = NO_HIDDEN_LOSSES
    """Losses between hidden states of the chunks, whose maps are trained too."""
    forward_backward: Callable = field(default_factory=get_forward_backward_func)
    """megatron-core's schedule, or the captured one of ``cuda_graphs``."""


def wrap(
    chunks: Sequence[MegatronModule],
    ddp_config: DistributedDataParallelConfig,
    groups: ProcessGroupCollection,
    **more: Any,
) -> Wrapped:
    """Return ``chunks`` with gradient buffers that data-parallel ranks reduce together.

    ``more`` as in ``Wrapped``.
    """
    with cuda_graphs.initialization_stream(get_model_config(chunks[0])):
        model = [
            DistributedDataParallel(
                config=get_model_config(chunk),
                ddp_config=ddp_config,
                module=chunk,
                # Later chunks' gradients are ready early: buckets pay for the first chunk only.
                disable_bucketing=index > 0,
                pg_collection=groups,
            )
            for index, chunk in enumerate(chunks)
        ]
    wrapped = Wrapped(model=model, groups=groups, **more)
    config = get_model_config(model[0])
    config.finalize_model_grads_func = partial(_finalize_model_grads, wrapped)
    if ddp_config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in model]
        config.no_sync_func = no_sync[0] if len(model) == 1 else no_sync
    return wrapped


def _finalize_model_grads(
    wrapped: Wrapped, model: list[MegatronModule], num_tokens: Tensor, **_: Any
) -> None:
    """Sum gradients over ranks and divide them by the tokens of the global batch. Collective."""
    core_finalize_model_grads(model, num_tokens, pg_collection=wrapped.groups)
    wrapped.hidden.finish_gradients()


def train_step(
    wrapped: Wrapped,
    optimizer: MegatronOptimizer,
    batches: list[Iterator[Batch]],
    shape: StepShape,
    objective: Mapping[str, float],
) -> tuple[dict[str, float], Callable[[], tuple[bool, float, int | None]]]:
    """Run forward and backward of one global batch.

    Args:
        wrapped: this rank's chunks, of ``wrap``.
        optimizer: as of ``get_megatron_optimizer``.
        batches: one iterator of micro-batches per chunk.
        shape: sizes of the step.
        objective: the weight of each per-token loss in what is minimised; that of hidden-state
            losses is their own ``alpha``.

    Returns:
        The losses, each a mean over the global batch's tokens in nats, equal on all ranks, and a
        function that applies the gradients; it returns whether it did (fp16 skips a step whose
        gradients overflow), their global norm and how many entries are zero, if the optimizer
        counts them. Applying is a call of its own, so that the caller can refuse a loss that is not
        finite while the weights are still good.
    """
    for chunk in wrapped.model:
        chunk.zero_grad_buffer()
        chunk.train()
    optimizer.zero_grad()
    get_model_config(wrapped.model[0]).grad_scale_func = optimizer.scale_loss
    wrapped.hidden.begin(wrapped.hidden.alpha * float(optimizer.get_loss_scale()))
    losses = _run(wrapped, batches, shape, objective, forward_only=False)

    def apply() -> tuple[bool, float, int | None]:
        updated, grad_norm, num_zeros = optimizer.step()
        return updated, grad_norm or 0.0, num_zeros

    return losses, apply


@torch.no_grad()
def evaluate(
    wrapped: Wrapped, batches: list[Iterator[Batch]], shape: StepShape, names: Sequence[str]
) -> dict[str, float]:
    """Return the losses ``names`` over one global batch, as ``train_step`` reports them."""
    for chunk in wrapped.model:
        chunk.eval()
    wrapped.hidden.begin(0.0)
    return _run(wrapped, batches, shape, dict.fromkeys(names, 1.0), forward_only=True)


def _run(
    wrapped: Wrapped,
    batches: list[Iterator[Batch]],
    shape: StepShape,
    objective: Mapping[str, float],
    *,
    forward_only: bool,
) -> dict[str, float]:
    reports = wrapped.forward_backward(
        forward_step_func=partial(_forward_step, objective),
        data_iterator=batches,
        model=list(wrapped.model),
        num_microbatches=shape.num_microbatches,
        seq_length=shape.seq_length,
        micro_batch_size=shape.micro_batch_size,
        forward_only=forward_only,
    )
    losses, num_tokens = _reduce(reports, list(objective), wrapped.groups)
    return losses | wrapped.hidden.report(num_tokens)


def _forward_step(
    objective: Mapping[str, float], batches: Iterator[Batch], model: MegatronModule
) -> tuple[Tensor | Mapping[str, Tensor], Callable]:
    batch = next(batches)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        **{name: batch[name] for name in STORED if name in batch},
    )
    return output, partial(_weigh, objective, batch["loss_mask"])


def _weigh(
    objective: Mapping[str, float], loss_mask: Tensor, output: Tensor | Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is minimised, its tokens, and the sums to report; all over this micro-batch.

    ``output`` are per-token losses {name: [b, s]}, or a language model's only loss.
    """
    losses = output if isinstance(output, Mapping) else {"lm loss": output}
    sums = {name: (losses[name].float() * loss_mask).sum() for name in objective}
    num_tokens = loss_mask.sum()
    total = sum(weight * sums[name] for name, weight in objective.items())
    report = torch.stack([*sums.values(), num_tokens]).detach().double()
    return total, num_tokens.int(), report


def _reduce(
    reports: list[Tensor], names: list[str], groups: ProcessGroupCollection
) -> tuple[dict[str, float], float]:
    """Return mean losses and the tokens, on every rank; only the last stage has ``reports``.

    Two collectives: a sum over data and context parallel ranks, a broadcast over the pipeline.
    """
    device = torch.cuda.current_device()
    totals = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
    for report in reports:
        totals += report
    torch.distributed.all_reduce(totals, group=groups.dp_cp)
    last_stage = torch.distributed.get_process_group_ranks(groups.pp)[-1]
    torch.distributed.broadcast(totals, src=last_stage, group=groups.pp)
    *sums, num_tokens = totals.tolist()
    means = [value / max(num_tokens, 1.0) for value in sums]
    return dict(zip(names, means, strict=True)), num_tokens
