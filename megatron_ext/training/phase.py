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
from megatron_ext.cli.programs import TrainFlags

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


def consumed_data_samples(saved: Mapping[str, Any], flags: TrainFlags) -> int:
    """Return how many samples of the data set of ``flags`` the saved run has trained on."""
    if changes(saved, flags):
        return 0
    return saved.get("consumed_data_samples", saved["consumed_train_samples"])


def with_steps_left(flags: TrainFlags, source: Checkpoint) -> TrainFlags:
    """Return ``flags`` whose --train-iters end a run of --train-samples that goes on from there."""
    batch = flags.batch
    if batch.train_samples is None:
        return flags
    left = max(0, batch.train_samples - source.args["consumed_train_samples"])
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
