"""The training loop: steps, evaluations and checkpoints until the end or a reason to stop."""

import contextlib
import gc
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from megatron_ext.checkpoint.folder import find
from megatron_ext.model import cuda_graphs
from megatron_ext.runtime.errors import INTERRUPTED, RUNTIME, UserError
from megatron_ext.runtime.lost_ranks import noted
from megatron_ext.runtime.signals import StopSignals
from megatron_ext.training import saving
from megatron_ext.training.diagnostics import params_norm, profiling, read_timers, timed
from megatron_ext.training.log import Log
from megatron_ext.training.state import Run
from megatron_ext.training.step import Batch, StepShape, evaluate, train_step

# Returns one iterator of micro-batches, from the given number of consumed samples on.
MakeBatches = Callable[[int], Iterator[Batch]]


def train(
    run: Run,
    *,
    train_batches: MakeBatches,
    valid_batches: MakeBatches | None,
    log: Log,
) -> int:
    """Train ``run`` to ``--train-iters``. Collective.

    Args:
        run: at the iteration where it begins.
        train_batches: makes the iterator of training micro-batches of this rank.
        valid_batches: likewise; every evaluation reads the same samples. None: no evaluation.
        log: where metrics go.

    Returns:
        The exit code: 0, or ``INTERRUPTED`` after a signal or a time limit, with all saved.

    Raises:
        UserError: a loss or the gradient norm is not finite. The last checkpoint stays; a loss is
            noticed before the weights change, a gradient after.
    """
    flags, counters = run.flags, run.counters
    began, first = time.perf_counter(), counters.iteration
    saved_at = first
    batches = [train_batches(counters.consumed_data_samples) for _ in run.model]
    weigh_first_step(run, train_batches)

    def save_unless_saved() -> None:
        nonlocal saved_at
        if flags.checkpoint.save and saved_at != counters.iteration:
            _save(run, log)
            saved_at = counters.iteration

    with (
        StopSignals() as stop,
        collecting_by_hand(flags.batch.manual_gc),
        profiling(
            flags.profile, flags.log.tensorboard_dir, torch.distributed.get_rank()
        ) as profile,
    ):
        while counters.iteration < flags.batch.train_iters:
            profile(counters.iteration)
            if counters.iteration - first == cuda_graphs.steps_before_capture(flags.graphs):
                overlaps = flags.parallel.overlap_param_gather
                dp_size = run.groups.dp.size()
                cuda_graphs.capture_layers(
                    run.model, run.optimizer, flags.batch, dp_size=dp_size, overlaps=overlaps
                )
            with noted(f"iteration {counters.iteration + 1}"):
                _step(run, batches, log)
            evaluates = valid_batches and _is_due(counters.iteration, flags.log.eval_interval)
            gc_is_due = evaluates or _is_due(counters.iteration, flags.batch.manual_gc_interval)
            if flags.batch.manual_gc and gc_is_due:
                gc.collect()
            if evaluates:
                validate(run, valid_batches, log, "validation", stop)
            if _is_due(counters.iteration, flags.checkpoint.save_interval):
                save_unless_saved()
            reason = _reason_to_stop(flags.batch, counters.iteration, began, stop)
            if reason and counters.iteration < flags.batch.train_iters:
                save_unless_saved()
                log.say(f"stopping after iteration {counters.iteration}: {reason}")
                return INTERRUPTED
        profile(counters.iteration)
    save_unless_saved()
    return 0


def _step(run: Run, batches: list[Iterator[Batch]], log: Log) -> None:
    """Take one optimizer step, count it and report it."""
    counters, batch_size = run.counters, run.flags.batch.global_batch_size
    log_interval = run.flags.log.log_interval
    losses, apply = step_of(run, batches)
    first = counters.consumed_data_samples
    where = (
        f"iteration {counters.iteration + 1} (training samples {first} to {first + batch_size - 1})"
    )
    _check_finite(run, losses, where)
    means = counters.mean_losses(losses)
    means |= run.wrapped.hidden.adapt(losses)
    learning_rate = run.optimizer.param_groups[0]["lr"]
    with timed(run.timers, "optimizer"):
        updated, grad_norm, num_zeros = apply()
    if updated:  # fp16 leaves out a step whose gradients overflow, and scales the loss down
        _check_finite(run, {"grad norm": grad_norm}, where)
        run.schedule.step(increment=batch_size)
    counters.iteration += 1
    counters.consumed_train_samples += batch_size
    counters.consumed_data_samples += batch_size
    counters.floating_point_operations += run.flops_per_step
    is_due, table = _is_due(counters.iteration, log_interval), None
    others = _others(run, num_zeros) if is_due else {}
    if is_due and run.flags.log.timing_log_level:
        times, table = read_timers(run.timers, log_interval)
        others |= times if run.flags.log.log_timers_to_tensorboard else {}
    log.step(
        counters.iteration,
        means,
        others,
        consumed_samples=counters.consumed_train_samples,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        loss_scale=float(run.optimizer.get_loss_scale()),
        skipped=not updated,
    )
    if is_due:
        counters.loss_sums = {}
    if table is not None:
        log.say(table)


def _others(run: Run, num_zeros: int | None) -> dict[str, float]:
    """Return what --log-params-norm and --log-num-zeros-in-grad ask for. Collective."""
    others: dict[str, float] = {}
    if run.flags.log.log_params_norm:
        with gathered_parameters(run):
            others["params-norm"] = params_norm(run.chunks, run.groups)
    if run.flags.log.log_num_zeros_in_grad:
        others["num-zeros"] = num_zeros
    return others


def weigh_first_step(run: Run, train_batches: MakeBatches) -> None:
    """Weigh hidden-state losses whose weight follows from the losses of the step before.

    Before the first step that is a forward pass over its batch. Collective.
    """
    if run.wrapped.hidden.alpha is None:
        batches = [train_batches(run.counters.consumed_data_samples) for _ in run.model]
        run.wrapped.hidden.adapt(_evaluate(run, batches))


def _evaluate(run: Run, batches: list[Iterator[Batch]]) -> dict[str, float]:
    """Return the losses over one global batch: always the same ones, as a captured step needs."""
    return evaluate(run.wrapped, batches, step_shape(run), run.eval_losses)


def step_of(run: Run, batches: list[Iterator[Batch]]) -> tuple[dict[str, float], Callable]:
    """Return what ``train_step`` does for ``run``."""
    return train_step(run.wrapped, run.optimizer, batches, step_shape(run), run.objective)


def step_shape(run: Run) -> StepShape:
    """Return the sizes of one step of ``run`` on this rank."""
    batch = run.flags.batch
    return StepShape(
        num_microbatches=batch.global_batch_size // (batch.micro_batch_size * run.groups.dp.size()),
        micro_batch_size=batch.micro_batch_size,
        seq_length=batch.seq_length,
    )


def validate(
    run: Run,
    make_batches: MakeBatches,
    log: Log,
    split: str,
    stop: StopSignals | None = None,
) -> None:
    """Report the mean losses of ``--eval-iters`` global batches, always the same. Collective.

    A run that is told to stop (``stop``) leaves its evaluation: what is trained is to be saved, and
    a launcher waits for seconds only.
    """
    batches = [make_batches(0) for _ in run.model]
    num_batches = run.flags.log.eval_iters
    totals: dict[str, float] = {}
    with gathered_parameters(run):
        for done in range(num_batches):
            if stop is not None and done and _caught(stop):
                log.say(f"leaving the {split} after {done} of {num_batches} batches")
                return
            for name, value in _evaluate(run, batches).items():
                totals[name] = totals.get(name, 0.0) + value / num_batches
    _check_finite(run, totals, f"the {split} of iteration {run.counters.iteration}")
    log.evaluation(run.counters.iteration, totals, split)


@contextlib.contextmanager
def gathered_parameters(run: Run) -> Iterator[None]:
    """Hold all parameters complete inside.

    With --overlap-param-gather they otherwise arrive during the forward pass of a training step.
    """
    late = run.model if run.flags.parallel.overlap_param_gather else []
    with contextlib.ExitStack() as stack:
        for chunk in late:
            chunk.disable_forward_pre_hook()
            stack.callback(chunk.enable_forward_pre_hook)
        yield


@contextlib.contextmanager
def collecting_by_hand(is_on: bool) -> Iterator[None]:
    """Leave Python's garbage to ``gc.collect`` inside: ranks wait for whoever collects."""
    if not is_on:
        yield
        return
    gc.disable()
    try:
        gc.collect()
        yield
    finally:
        gc.enable()


def _save(run: Run, log: Log) -> None:
    with gathered_parameters(run):
        saving.save(run)
    iteration = run.counters.iteration
    tokens = run.counters.consumed_train_samples * run.flags.batch.seq_length
    log.progress(
        f"Saved checkpoint\tIteration: {run.counters.iteration}\t"
        f"Floating-point operations: {run.counters.floating_point_operations:.2e}\t"
        f"Tokens (in billions): {tokens / 1e9:.2f}"
    )
    log.say(
        f"  successfully saved checkpoint from iteration {iteration:7d} to "
        f"{run.flags.checkpoint.save}"
    )


def _is_due(iteration: int, interval: int | None) -> bool:
    return bool(interval) and iteration % interval == 0


def _check_finite(run: Run, values: Mapping[str, float], where: str) -> None:
    """Raise on every rank alike if a value, equal on all of them, is not finite."""
    save = run.flags.checkpoint.save
    for name, value in values.items():
        if not math.isfinite(value):
            last = find(save) if save else None
            saved = f"; {last} is good" if last else ""
            raise UserError(
                f"{name} is {value} at {where}: lower --lr or look at the data{saved}.", RUNTIME
            )


def _caught(stop: StopSignals) -> bool:
    """Whether any rank was told to stop: one small all-reduce."""
    return bool(_highest(stop.caught)[0])


def _highest(*values: int) -> list[int]:
    """Return the highest of all ranks' values. Collective."""
    highest = torch.tensor(values, device=torch.cuda.current_device())
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    return highest.tolist()


def _reason_to_stop(batch: Any, iteration: int, began: float, stop: StopSignals) -> str | None:
    """Return why to stop, the same on every rank: one small all-reduce."""
    minutes = (time.perf_counter() - began) / 60
    late = batch.exit_duration_in_mins is not None and minutes > batch.exit_duration_in_mins
    caught, late = _highest(stop.caught, int(late))
    if caught:
        return f"received {signal.Signals(caught).name}"
    if late:
        return f"--exit-duration-in-mins {batch.exit_duration_in_mins} are over"
    if _is_due(iteration, batch.exit_interval):
        return f"--exit-interval {batch.exit_interval}"
    return None
