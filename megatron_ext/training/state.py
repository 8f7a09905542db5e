"""A run in training on this rank: model, optimizer, schedule, counters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.timers import Timers
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_model_config

from megatron_ext.arch import Arch
from megatron_ext.checkpoint import checkpoints
from megatron_ext.cli.programs import TrainFlags
from megatron_ext.distillation.hidden import NO_HIDDEN_LOSSES, HiddenLosses
from megatron_ext.model import cuda_graphs
from megatron_ext.model.build import LanguageModel
from megatron_ext.training import torch_adam
from megatron_ext.training.optimizer import make_schedule, optimizer_config
from megatron_ext.training.step import Wrapped, wrap


@dataclass
class Counters:
    """Progress of a run: the part of its state that changes outside of tensors."""

    iteration: int = 0
    consumed_train_samples: int = 0
    consumed_data_samples: int = 0
    """Of them, those of the present data set, see ``phase``."""
    floating_point_operations: float = 0.0
    loss_sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Since the log's last line: the sum of each loss over steps, and how many steps."""

    def mean_losses(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Count the losses of a step and return their means since the log's last line.

        A step that fp16 leaves out counts too: its losses are those of the weights as they are.
        """
        means = {}
        for name, value in losses.items():
            total, steps = self.loss_sums.get(name, (0.0, 0))
            self.loss_sums[name] = total + value, steps + 1
            means[name] = (total + value) / (steps + 1)
        return means


@dataclass(frozen=True, kw_only=True)
class Run:
    """A model in training on this rank."""

    flags: TrainFlags
    arch: Arch
    chunks: list[LanguageModel]
    """What is trained and saved."""
    wrapped: Wrapped
    """What a step runs: ``chunks``, or each beside its teacher, with gradient buffers."""
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    objective: Mapping[str, float]
    """The weight of each loss in what a step minimises."""
    eval_losses: tuple[str, ...]
    """The losses that an evaluation reports."""
    timers: Timers
    """megatron-core's, which it starts and stops around its own operations too."""
    flops_per_step: float
    """Floating-point operations of one step on all ranks together."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """config.json of the Hugging Face model that this one comes from."""
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict)
    """What stands beside every checkpoint, as ``Checkpoint.tokenizer_files``."""
    counters: Counters = field(default_factory=Counters)

    @property
    def groups(self) -> ProcessGroupCollection:
        """megatron-core's process groups."""
        return self.wrapped.groups

    @property
    def model(self) -> Sequence[DistributedDataParallel]:
        """The chunks of ``wrapped``."""
        return self.wrapped.model


def make_run(
    flags: TrainFlags,
    arch: Arch,
    groups: ProcessGroupCollection,
    chunks: list[LanguageModel],
    modules: Sequence[MegatronModule],
    *,
    objective: Mapping[str, float],
    eval_losses: tuple[str, ...],
    flops_per_token: float,
    hidden: HiddenLosses = NO_HIDDEN_LOSSES,
    source: checkpoints.Checkpoint | None = None,
) -> Run:
    """Return a run at iteration 0; ``modules`` are ``chunks``, or each beside its teacher.

    What ``source`` says of its origin is kept; its weights are not loaded.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=flags.precision.bf16 and not flags.precision.grad_reduce_in_bf16,
        overlap_grad_reduce=flags.parallel.overlap_grad_reduce,
        overlap_param_gather=flags.parallel.overlap_param_gather,
        use_distributed_optimizer=flags.parallel.use_distributed_optimizer,
        fp8_param_gather=flags.fp8.fp8_param_gather,
    )
    schedule = cuda_graphs.forward_backward(flags.graphs)
    wrapped = wrap(modules, ddp_config, groups, hidden=hidden, forward_backward=schedule)
    timers = Timers(flags.log.timing_log_level, flags.log.timing_log_option)
    config = get_model_config(wrapped.model[0])
    config.timers, config.barrier_with_L1_time = timers, flags.log.barrier_with_l1_time
    optimizer = get_megatron_optimizer(
        replace(optimizer_config(flags, chunks[0].config.params_dtype), timers=timers),
        wrapped.model,
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    torch_adam.fuse(optimizer)
    return Run(
        flags=flags,
        arch=arch,
        chunks=chunks,
        wrapped=wrapped,
        optimizer=optimizer,
        schedule=make_schedule(flags, optimizer),
        objective=objective,
        eval_losses=eval_losses,
        timers=timers,
        flops_per_step=flops_per_token * flags.batch.global_batch_size * flags.batch.seq_length,
        origin=source.origin if source else {},
        tokenizer_files=source.tokenizer_files() if source else {},
    )
