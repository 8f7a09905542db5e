r"""Store a teacher's likeliest tokens for the training data of a run, under any layout.

    torchrun --nproc-per-node 2 tools/store_teacher.py --teacher-load teacher --kd-teacher-store \
        store --kd-top-k 64 --data-path corpus --train-iters 1000 --global-batch-size 32 ...
    torchrun ... pretrain_distill.py --load student --kd-teacher-store store --train-iters 1000 ...

8 bytes per kept token: 64 of them are 2 MiB per sample of 4,096 positions. Started again, it goes
on with what is missing. Data, split, seed, sequence length, iterations and batch size are those of
the training run, which decide what its samples are.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ext.checkpoint.folder import locate
from megatron_ext.checkpoint.unpickling import trust
from megatron_ext.cli import megatron_flags as group
from megatron_ext.cli.data_args import with_data_args
from megatron_ext.cli.flag_checks import (
    data_args_problems,
    data_problems,
    layout_problems,
    precision_problems,
    refuse,
    virtual_stage_problems,
)
from megatron_ext.cli.parser import REQUIRED, flag, parse
from megatron_ext.cli.programs import without_idle_sequence_parallel
from megatron_ext.data.vocabulary import check_tokenizer_file
from megatron_ext.runtime import heavy
from megatron_ext.runtime.errors import run_main


@dataclass(frozen=True, kw_only=True)
class Storing:
    """Storing."""

    teacher_load: str = flag(REQUIRED, "folder of the teacher's checkpoint")
    kd_teacher_store: str = flag(REQUIRED, "folder to write")
    kd_top_k: int = flag(REQUIRED, "tokens to keep of each position", at_least=1)
    kd_temperature: float = flag(1.0, "softmax temperature; the training run's", above=0)
    train_iters: int = flag(REQUIRED, "steps of the training run", at_least=1)
    trust_checkpoint: bool = group.trust_flag()
    global_batch_size: int = flag(REQUIRED, "samples of a step of the training run", at_least=1)


@dataclass(frozen=True, kw_only=True)
class StoreFlags:
    """Store a teacher's likeliest tokens."""

    storing: Storing
    parallel: group.Parallel
    batch: group.Batch
    precision: group.Precision
    data: group.Data


def main(argv: Sequence[str] | None = None) -> None:
    """Store what is not there yet."""
    flags = parse_store(argv)
    trust(flags.storing.trust_checkpoint)
    folder = locate(flags.storing.teacher_load)
    check_tokenizer_file(flags.data)
    with heavy.imports():
        from megatron_ext.inference import storing
    storing.store_teacher(flags, folder)


def parse_store(argv: Sequence[str] | None) -> StoreFlags:
    """Return the checked flags."""
    flags = parse(StoreFlags, sys.argv[1:] if argv is None else argv)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    refuse(data_args_problems(flags.data))
    flags = replace(flags, data=with_data_args(flags.data))
    refuse(
        layout_problems(flags.parallel, flags.batch.seq_length, world_size),
        virtual_stage_problems(flags.parallel),
        precision_problems(flags.precision),
        data_problems(flags.data),
    )
    return replace(flags, parallel=without_idle_sequence_parallel(flags.parallel))


if __name__ == "__main__":
    run_main(main)
