"""torch's Adam in one kernel, and inside megatron-core's checkpoints.

The distributed optimizer of megatron-core 0.19.2 saves and loads those of Transformer Engine and
Apex, which keep one step count per parameter group. torch's, used where neither is installed, keeps
one per parameter. Places that do not expect that:

    planning a load        needs the state of a step that has not been taken: ``allocate``
    filling the state      looks for a step among the loaded tensors: ``_keep_step``
    loading SGD            has no function that makes its state: ``allocate``
    after a load           all parameters share one step tensor, which each of them then counts up:
                           ``fuse`` gives each a copy
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def fuse(optimizer: MegatronOptimizer) -> None:
    """Let torch's Adam update each parameter in one pass over its memory, on CUDA.

    To be called again after a load: a checkpoint brings the choice of the machine that wrote it.
    """
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups if _is_torch_adam(part) else ():
            is_fused = all(parameter.is_cuda for parameter in group["params"])
            group.update(fused=is_fused, foreach=None)
            for state in (part.optimizer.state.get(p, {}) for p in group["params"]):
                if "step" in state:
                    device = state["exp_avg"].device if is_fused else "cpu"
                    state["step"] = state["step"].to(device, copy=True)


def allocate(optimizer: MegatronOptimizer) -> None:
    """Give every parameter on this rank the empty state that its first step would make."""
    for part in _parts(optimizer):
        if part.init_state_fn is None:  # megatron-core has none for SGD, and calls it
            part.init_state_fn = _allocate_momentum
    for inner in _torch_adams(optimizer):
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    _let_distributed_optimizer_keep_steps()


def _allocate_momentum(inner: torch.optim.Optimizer, _: Any) -> None:
    """Give every parameter of an SGD its momentum, zero: the first step makes the same of it."""
    for group in inner.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            inner.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def _torch_adams(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    for part in _parts(optimizer):
        if _is_torch_adam(part) and isinstance(part, DistributedOptimizer):
            yield part.optimizer


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _is_torch_adam(part: MegatronOptimizer) -> bool:
    return isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW)


@functools.cache
def _let_distributed_optimizer_keep_steps() -> None:
    fill = DistributedOptimizer._set_main_param_and_optimizer_states

    def _keep_step(self: DistributedOptimizer, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = {"step": state["step"]} if "step" in state else {}
        fill(self, model_param, tensors | step)

    DistributedOptimizer._set_main_param_and_optimizer_states = _keep_step
