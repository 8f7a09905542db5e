"""torch's Adam inside megatron-core's checkpoints.

The distributed optimizer of megatron-core 0.19.2 saves and loads those of Transformer Engine and
Apex, which keep one step count per parameter group. torch's, used where neither is installed, keeps
one per parameter. Three places do not expect that:

    planning a load        needs the state of a step that has not been taken: ``allocate``
    filling the state      looks for a step among the loaded tensors: ``_keep_step``
    after a load           all parameters share one step tensor, which each of them then counts up:
                           ``unshare_steps``
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def allocate(optimizer: MegatronOptimizer) -> None:
    """Give every parameter on this rank the empty state that its first step would make."""
    for inner in _torch_adams(optimizer):
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    _let_distributed_optimizer_keep_steps()


def unshare_steps(optimizer: MegatronOptimizer) -> None:
    """Give each parameter a step count of its own, of the same value."""
    for inner in _torch_adams(optimizer):
        for state in inner.state.values():
            state["step"] = state["step"].clone()


def _torch_adams(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        is_adam = isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW)
        if is_adam and isinstance(part, DistributedOptimizer):
            yield part.optimizer


@functools.cache
def _let_distributed_optimizer_keep_steps() -> None:
    fill = DistributedOptimizer._set_main_param_and_optimizer_states

    def _keep_step(self: DistributedOptimizer, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = {"step": state["step"]} if "step" in state else {}
        fill(self, model_param, tensors | step)

    DistributedOptimizer._set_main_param_and_optimizer_states = _keep_step
