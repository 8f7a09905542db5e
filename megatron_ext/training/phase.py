"""Change of phase: a run that goes on with another batch size, sequence length or data.

Weights, optimizer state and the iteration go on. What is counted in samples is adapted:

* Another sequence length or blend is another data set: it begins at its first sample.
* Another batch size goes on in the same data set, at the next sample.
* The schedule of megatron-core counts samples; it stays where it is in iterations. In a run of
  --train-samples it stays where it is in samples, and the samples left make the iterations left.

Pure functions on a checkpoint's saved args; no collectives.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_ext.checkpoint.folder import Checkpoint
from megatron_ext.cli.parser import dashed
from megatron_ext.cli.programs import TrainFlags
from megatron_ext.runtime.errors import CHECKPOINT, UserError

BLENDS = ("data_path", "train_data_path")
SCHEDULE_IN_SAMPLES = ("num_steps", "lr_warmup_steps", "lr_decay_steps", "wd_incr_steps")


def changes(saved: Mapping[str, Any], flags: TrainFlags) -> dict[str, tuple[Any, Any]]:
    """Return {setting: (saved, now)} of what makes another data set; empty if it is the same one.

    Args:
        saved: a checkpoint's args. Settings that it does not name are taken to be the same.
        flags: of the run that goes on.
    """
    now = {"seq_length": flags.batch.seq_length}
    now |= {name: getattr(flags.data, name) for name in ("split", "mock_data", *BLENDS)}
    found = {name: (saved[name], value) for name, value in now.items() if name in saved}
    return {
        name: values
        for name, values in found.items()
        if _comparable(name, values[0]) != _comparable(name, values[1])
    }


OBJECTIVE = "another objective from here on"
# What follows from another value, where it is more than that the new one holds from here on.
CONSEQUENCES = {
    "seed": "another order of data and dropout: samples may come twice or not at all",
    "teacher_load": OBJECTIVE,
    "optimizer": "another update rule needs --no-load-optim",
    "logit_kernels": "losses differ in their last bits",
    "transformer_impl": "sums differ in their last bits",
}
# Where a run writes and what it says and checks: no number depends on them. And what is checked
# or converted elsewhere.
NOT_OF_THE_RUN = {
    *("load", "save", "ckpt_step", "pretrained_checkpoint", "finetune", "save_interval"),
    *("save_retain_interval", "verify_integrity", "trust_checkpoint", "exit_interval"),
    *("exit_duration_in_mins", "exit_on_missing_checkpoint", "exit_signal_handler", "hf_config"),
    *("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_cache_path"),
    *("num_workers", "distributed_timeout_minutes", "padded_vocab_size", "params_dtype"),
    *("tokenizer_model", "tokenizer_sha256", "vocab_file", "merge_file", "vocab_size"),
    *("consumed_train_samples", "consumed_data_samples", "hidden_loss_alpha", "train_iters"),
    "logged_loss_sums",
    *("data_parallel_size", "override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"),
    *("manual_gc", "manual_gc_interval", "mmap_bin_files", "kd_teacher_store"),
}
NOT_OF_THE_RUN_PREFIXES = ("log_", "eval_", "tensorboard_", "wandb_", "profile", "timing_")


def table_of_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return a line for each flag that differs: the flag, before, now, what follows; or nothing.

    Args:
        saved: a checkpoint's args.
        now: those that the run would save. What only one of them names is taken to be the same.
    """
    names = [
        name
        for name in sorted(saved.keys() & now.keys())
        if name not in NOT_OF_THE_RUN
        and not name.startswith(NOT_OF_THE_RUN_PREFIXES)
        and _plain(saved[name]) != _plain(now[name])
    ]
    rows = [("flag", "before", "now", "what follows")]
    for name in names:
        objective = OBJECTIVE if name.startswith("kd_") else "holds from here on"
        change = str(saved[name]), str(now[name])
        rows.append((dashed(name), *change, CONSEQUENCES.get(name, objective)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  " + "  ".join([*(x.ljust(w) for x, w in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    return "\n".join(lines) if names else ""


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON would hold it; None, False, 0 and nothing are alike."""
    return list(value) if isinstance(value, tuple | list) else value or None


def consumed_data_samples(saved: Mapping[str, Any], flags: TrainFlags) -> int:
    """Return how many samples of the data set of ``flags`` the saved run has trained on."""
    if changes(saved, flags):
        return 0
    return saved.get("consumed_data_samples", saved.get("consumed_train_samples", 0))


def check_goes_on(source: Checkpoint, *, load_optim: bool) -> None:
    """Refuse to go on from ``source`` if it does not say how far it is."""
    needed = {"iteration": source.common, "consumed_train_samples": source.args}
    needed |= {"opt_param_scheduler": source.common} if load_optim else {}
    for name, where in needed.items():
        if where.get(name) is None:
            fix = "--load it with --finetune for its weights alone"
            if name == "opt_param_scheduler":
                fix = f"--no-load-optim goes on without the optimizer's state, or {fix}"
            raise UserError(
                f"{source.folder} does not hold {name}, as every run that goes on needs: {fix}.",
                CHECKPOINT,
            )


def with_steps_left(flags: TrainFlags, source: Checkpoint) -> TrainFlags:
    """Return ``flags`` whose --train-iters end a run of --train-samples that goes on from there."""
    batch = flags.batch
    if batch.train_samples is None:
        return flags
    left = max(0, batch.train_samples - source.args.get("consumed_train_samples", 0))
    steps = left // batch.global_batch_size
    return replace(flags, batch=replace(batch, train_iters=source.iteration + steps))


def rescaled_schedule(schedule: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """Return the saved state of the schedule for another global batch size.

    Args:
        schedule: megatron-core's ``OptimizerParamScheduler.state_dict``, counted in samples.
        before: the global batch size that it was saved with.
        after: the one it goes on with. As many iterations have passed as before.
    """
    scaled = {name: schedule[name] * after // before for name in SCHEDULE_IN_SAMPLES}
    return {**schedule, **scaled}


def _comparable(name: str, value: Any) -> Any:
    """Return ``value`` without the folder of data files: data may move between two starts."""
    if name in BLENDS and isinstance(value, Sequence):
        return [os.path.basename(part) for part in value]
    return value or None
