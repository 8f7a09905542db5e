"""Measurements beside losses: norms, times, a profile."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.timers import Timers
from megatron.core.transformer.module import MegatronModule, param_is_not_shared

from megatron_ext.cli.log_flags import Profile
from megatron_ext.runtime.errors import USAGE, UserError, warn

# Megatron-LM's names of what it times: level 1, and from forward-compute on level 2.
TIMED = (
    "forward-backward",
    "all-grads-sync",
    "embedding-grads-all-reduce",
    "non-tensor-parallel-grads-all-reduce",
    "optimizer",
    "optimizer-copy-to-main-grad",
    "optimizer-unscale-and-check-inf",
    "optimizer-clip-main-grad",
    "optimizer-count-zeros",
    "optimizer-inner-step",
    "optimizer-copy-main-to-model-params",
    "params-all-gather",
    "forward-compute",
    "backward-compute",
    "forward-recv",
    "forward-send",
    "backward-recv",
    "backward-send",
    "forward-send-forward-recv",
    "forward-send-backward-recv",
    "backward-send-forward-recv",
    "backward-send-backward-recv",
    "forward-backward-send-forward-backward-recv",
)


def params_norm(chunks: Iterable[MegatronModule], groups: ProcessGroupCollection) -> float:
    """Return the L2 norm of all weights of a model, each counted once, on every rank.

    Two collectives: over the ranks that share the weights of all tokens, and those of experts.
    """
    squares = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(
            parameter, tp_group=groups.tp
        ):
            is_expert = not getattr(parameter, "allreduce", True)
            squares[int(is_expert)] += parameter.detach().double().square().sum()
    torch.distributed.all_reduce(squares[0], group=groups.mp)
    torch.distributed.all_reduce(squares[1], group=groups.tp_ep_pp)
    return squares.sum().sqrt().item()


@contextlib.contextmanager
def timed(timers: Timers, name: str) -> Iterator[None]:
    """Time a part of a step, at level 1."""
    timer = timers(name, log_level=1)
    timer.start()
    try:
        yield
    finally:
        timer.stop()


def read_timers(timers: Timers, num_steps: int) -> tuple[dict[str, float], str | None]:
    """Return the longest times over ranks and a text of all, of one step, and begin anew.

    Two collectives.

    Args:
        timers: at level 1 or 2.
        num_steps: that were timed.

    Returns:
        {"forward-backward-time": seconds, ...}, and Megatron-LM's table in milliseconds.
    """
    # What Timers.write gives to a TensorBoard writer, and to no other object.
    extremes = timers._get_global_min_max_time(
        TIMED, reset=False, barrier=False, normalizer=num_steps
    )
    longest = {f"{name}-time": value for name, (_, value) in extremes.items()}
    return longest, timers.get_all_timers_string(TIMED, normalizer=num_steps, reset=True)


@contextlib.contextmanager
def profiling(profile: Profile, folder: str | None, rank: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to be told the iteration before each step and after the last.

    Args:
        profile: what is profiled.
        folder: of TensorBoard, for torch's traces.
        rank: of this process.

    Raises:
        UserError: with code ``USAGE``; nsys without a GPU.
    """
    if profile.profile and not profile.use_pytorch_profiler and not torch.cuda.is_available():
        raise UserError("--profile needs a GPU; --use-pytorch-profiler does without one.", USAGE)
    if not profile.profile or rank not in (profile.profile_ranks or (0,)):
        yield lambda iteration: None
        return
    profiler = _torch_profiler(profile, folder) if profile.use_pytorch_profiler else _Nsys()
    running: Any = None

    def at(iteration: int) -> None:
        nonlocal running
        if iteration == profile.profile_step_start:
            profiler.start()
            running = profiler
        if iteration == profile.profile_step_end and running is not None:
            stop()

    def stop() -> None:
        nonlocal running
        stopped, running = running, None
        try:
            stopped.stop()
        except (OSError, RuntimeError) as error:  # what is learnt is worth more than its profile
            warn(f"--profile: nothing is written: {error}.")

    try:
        yield at
    finally:
        if running is not None:
            stop()


class _Nsys:
    """The range that nsys captures (--capture-range=cudaProfilerApi)."""

    def start(self) -> None:
        torch.cuda.cudart().cudaProfilerStart()

    def stop(self) -> None:
        torch.cuda.cudart().cudaProfilerStop()


def _torch_profiler(profile: Profile, folder: str | None) -> torch.profiler.profile:
    return torch.profiler.profile(
        on_trace_ready=torch.profiler.tensorboard_trace_handler(folder),
        record_shapes=profile.pytorch_profiler_collect_shapes,
        with_stack=profile.pytorch_profiler_collect_callstack,
    )
