"""Reports of a run: Megatron-LM's log line, metrics.jsonl, TensorBoard, Weights & Biases, a bar.

All of it on rank 0, which knows the losses because a step broadcasts them.
"""

import contextlib
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_ext.cli.programs import TrainFlags, flags_as_dict, format_flags
from megatron_ext.runtime.collective_errors import on_first_rank
from megatron_ext.runtime.errors import UserError, warn
from megatron_ext.runtime.extras import need
from megatron_ext.runtime.texts import parse_json

# What may stand in a line beside losses: name, Megatron-LM's words and format.
OTHERS = (("num-zeros", "num zeros", ".0f"), ("params-norm", "params norm", ".3f"))
SINKS = {"metrics": "metrics.jsonl", "board": "--tensorboard-dir", "wandb": "--wandb-project"}


class Log:
    """Writes a run's metrics; on ranks other than 0 every method does nothing.

    Beside the checkpoints: ``flags.json``, the flags of the last start, and ``metrics.jsonl``, one
    JSON object per logged step or evaluation.
    """

    def __init__(self, flags: TrainFlags, *, flops_per_step: float, first_iteration: int):
        """Open the files of ``flags`` and print them.

        Args:
            flags: of the run.
            flops_per_step: of one step on all ranks together.
            first_iteration: where the run begins; later lines of an old metrics.jsonl are dropped.

        Raises:
            UserError: on every rank, if a file cannot be written.
        """
        self.is_writer = torch.distributed.get_rank() == 0
        self.world_size = torch.distributed.get_world_size()
        self.flags = flags
        self.flops_per_step = flops_per_step
        self.tokens_per_step = flags.batch.global_batch_size * flags.batch.seq_length
        self.metrics = self.board = self.bar = self.wandb = None
        self.since, self.steps_since, self.skipped = time.perf_counter(), 0, 0
        on_first_rank(lambda: self._open(first_iteration))

    def _open(self, first_iteration: int) -> None:
        flags = self.flags
        print(format_flags(flags), flush=True)
        try:
            if flags.checkpoint.save:
                folder = Path(flags.checkpoint.save)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "flags.json").write_text(json.dumps(flags_as_dict(flags), indent=1))
                self.metrics = _reopen(folder / "metrics.jsonl", first_iteration)
        except OSError as error:
            raise UserError(f"logs under --save: {error}.") from error
        self.board = _board(flags, first_iteration)
        self.wandb = _wandb_run(flags)
        self.progress("Starting job")
        if flags.log.progress:
            self.bar = tqdm(
                total=flags.batch.train_iters, initial=first_iteration, unit="step", mininterval=1.0
            )

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.is_writer:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, text: str) -> None:
        """Append a line to progress.txt, as Megatron-LM writes it, under --log-progress."""
        if not self.is_writer or not self.flags.log.log_progress:
            return
        job = os.environ.get("SLURM_JOB_ID", "")
        line = f"{datetime.now():%F %T}\tJob ID: {job}\t# GPUs: {self.world_size}\t{text}\n"
        try:
            with (Path(self.flags.checkpoint.save) / "progress.txt").open("a") as file:
                file.write(line)
        except OSError as error:
            warn(f"progress.txt: {error}.")

    def step(
        self,
        iteration: int,
        losses: dict[str, float],
        others: dict[str, float],
        *,
        consumed_samples: int,
        learning_rate: float,
        grad_norm: float,
        loss_scale: float,
        skipped: bool,
    ) -> None:
        """Count a step; every ``--log-interval`` steps, report it, and ``others`` beside losses.

        ``losses`` are means over the steps since the last report, everything else is this step's,
        as Megatron-LM prints them.
        """
        self.steps_since += 1
        self.skipped += skipped
        if self.bar is not None:
            self.bar.set_postfix_str(_brief(losses), refresh=False)
            self.bar.update()
        if iteration % self.flags.log.log_interval:
            return
        seconds = (time.perf_counter() - self.since) / self.steps_since
        metrics = {
            **losses,
            "consumed-samples": consumed_samples,
            "learning-rate": learning_rate,
            "grad-norm": grad_norm,
            "loss-scale": loss_scale,
            "batch-size": self.flags.batch.global_batch_size,
            "iteration-time": seconds,
            "tokens/s": self.tokens_per_step / seconds,
            "throughput": self.flops_per_step / seconds / self.world_size / 1e12,
            "mem-GiB": memory_gib(),
            **others,
        }
        self._write(iteration, metrics)
        self.say(self._line(iteration, losses, metrics))
        self.since, self.steps_since = time.perf_counter(), 0

    def evaluation(self, iteration: int, losses: dict[str, float], split: str) -> None:
        """Report losses on held-out data, as ``<loss> <split>``."""
        metrics = {f"{name} {split}": value for name, value in losses.items()}
        if "lm loss" in losses:
            metrics[f"lm loss {split} ppl"] = float(
                torch.tensor(min(losses["lm loss"], 20.0)).exp()
            )
        self._write(iteration, metrics)
        values = " | ".join(f"{name}: {value:.6E}" for name, value in metrics.items())
        text = f" {split} loss at iteration {iteration} | {values} |"
        self.say(f"{'-' * len(text)}\n{text}\n{'-' * len(text)}")
        self.since, self.steps_since = time.perf_counter(), 0

    def close(self) -> None:
        """Write out what is buffered."""
        self._tell("metrics", lambda file: file.close())
        self._tell("board", lambda board: board.close())
        self._tell("wandb", lambda run: run.finish())
        if self.bar is not None:
            self.bar.close()

    def _write(self, iteration: int, metrics: dict[str, float]) -> None:
        line = json.dumps({"iteration": iteration, **metrics})

        def add_scalars(board: Any) -> None:
            for name, value in metrics.items():
                board.add_scalar(name, value, iteration)

        self._tell("metrics", lambda file: print(line, file=file, flush=True))
        self._tell("board", add_scalars)
        self._tell("wandb", lambda run: run.log(metrics, step=iteration))

    def _tell(self, name: str, action: Callable[[Any], None]) -> None:
        """Call ``action`` with an open sink. One that fails is told nothing more.

        A full disk or a lost connection: what is learnt is worth more than its log, and a rank that
        raised alone would leave the others waiting.
        """
        sink = getattr(self, name)
        if sink is None:
            return
        try:
            action(sink)
        except Exception as error:
            setattr(self, name, None)
            warn(f"{SINKS[name]}: {error}; no metrics are written from here on.")

    def _line(self, iteration: int, losses: dict[str, float], metrics: dict[str, Any]) -> str:
        batch, seconds = self.flags.batch, metrics["iteration-time"]
        left = timedelta(seconds=round((batch.train_iters - iteration) * seconds))
        cells = [
            f" [{datetime.now():%F %T}] iteration {iteration:8d}/{batch.train_iters:8d}",
            f"consumed samples: {metrics['consumed-samples']:12d}",
            f"elapsed time per iteration (ms): {seconds * 1000:.1f}",
            f"throughput per GPU (TFLOP/s/GPU): {metrics['throughput']:.3f}",
            f"learning rate: {metrics['learning-rate']:.6E}",
            f"global batch size: {batch.global_batch_size:5d}",
            *(f"{name}: {value:.6E}" for name, value in losses.items()),
            f"loss scale: {metrics['loss-scale']:.1f}",
            f"grad norm: {metrics['grad-norm']:.3f}",
            *(f"{text}: {metrics[name]:{form}}" for name, text, form in OTHERS if name in metrics),
            f"number of skipped iterations: {self.skipped:3d}",
            f"tokens/s: {metrics['tokens/s']:.0f}",
            f"mem: {metrics['mem-GiB']:.2f} GiB",
            f"ETA: {left}",
        ]
        return " | ".join(cells) + " |"


def _board(flags: TrainFlags, first_iteration: int) -> Any:
    """Return TensorBoard's writer, or None."""
    folder = flags.log.tensorboard_dir
    if not folder:
        return None
    board = need("torch.utils.tensorboard", "log", "--tensorboard-dir")
    try:
        return board.SummaryWriter(
            folder, purge_step=first_iteration, max_queue=flags.log.tensorboard_queue_size
        )
    except Exception as error:  # what is learnt is worth more than its log
        warn(f"--tensorboard-dir {folder}: {error}; nothing is written there.")
        return None


def _wandb_run(flags: TrainFlags) -> Any:
    """Return a Weights & Biases run with the flags as its configuration, or None."""
    log, save = flags.log, flags.checkpoint.save
    if log.wandb_project is None:
        return None
    wandb = need("wandb", "log", "--wandb-project")
    try:
        return wandb.init(
            project=log.wandb_project,
            name=log.wandb_exp_name,
            entity=log.wandb_entity,
            dir=log.wandb_save_dir or save,
            config=flags_as_dict(flags),
        )
    except Exception as error:  # no key, no network: what is learnt is worth more than its log
        warn(f"--wandb-project {log.wandb_project}: {error}; nothing is sent there.")
        return None


def memory_gib() -> float:
    """Return the peak memory of this rank: of the GPU, or of the process without one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _reopen(path: Path, first_iteration: int) -> Any:
    """Open ``path`` to append what a run writes from ``first_iteration`` on; no line is repeated.

    A run that begins anew leaves an older file under another name. A resumed one evaluates on the
    test data again if it has nothing left to train. What a crash of the machine left half-written
    is dropped too.
    """
    if not first_iteration and path.exists() and path.stat().st_size:
        kept_as = next(p for p in map(_numbered(path), itertools.count(1)) if not p.exists())
        path.rename(kept_as)
        warn(f"{path} of an earlier run is kept as {kept_as.name}.")
    kept = []
    for line in path.read_text().splitlines() if first_iteration and path.exists() else ():
        with contextlib.suppress(ValueError):
            values = parse_json(line)
            is_test = any(name.endswith(" test") for name in values)
            if values["iteration"] < first_iteration + (not is_test):
                kept.append(line)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text("".join(f"{line}\n" for line in kept))
    aside.replace(path)
    return path.open("a")


def _numbered(path: Path) -> Callable[[int], Path]:
    return lambda number: path.with_name(f"{path.stem}.{number}{path.suffix}")


def _brief(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
