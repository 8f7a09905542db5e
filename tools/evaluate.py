r"""Evaluate a checkpoint on a data set, alone or beside its teacher, under any layout.

    torchrun --nproc-per-node 2 tools/evaluate.py --load student --teacher-load teacher \
        --data-path corpus/valid_text_document --seq-length 4096 --micro-batch-size 1 \
        --tensor-model-parallel-size 2

Every token of the data but the first is predicted once, in order, without shuffling. Figures are
means over these tokens, in nats. A BertModel reads them in order too and predicts 15 % of them, the
same ones each time (--seed).
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ext.checkpoint.folder import locate
from megatron_ext.checkpoint.unpickling import trust
from megatron_ext.cli import megatron_flags as group
from megatron_ext.cli.flag_checks import (
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
class Evaluation:
    """Evaluation."""

    load: str = flag(REQUIRED, "folder of the checkpoint")
    ckpt_step: int | None = flag(None, "iteration of --load; default the latest", at_least=0)
    teacher_load: str | None = flag(None, "folder of a checkpoint to compare it with")
    data_path: tuple[str, ...] = flag(REQUIRED, "prefixes of indexed data; all of each is read")
    eval_samples: int | None = flag(
        None,
        "samples to read at most, spread over the data; default all (not in Megatron-LM)",
        at_least=1,
    )
    num_workers: int = flag(2, "processes that read data", at_least=0)
    json: str | None = flag(None, "file for the figures; default none")
    trust_checkpoint: bool = group.trust_flag()


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    """Evaluate a checkpoint on a data set."""

    evaluation: Evaluation
    parallel: group.Parallel
    batch: group.Batch
    precision: group.Precision
    tokenizer: group.Tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures of a checkpoint."""
    flags = parse_evaluate(argv)
    options = flags.evaluation
    trust(options.trust_checkpoint)
    folder = locate(options.load, options.ckpt_step)
    teacher = locate(options.teacher_load) if options.teacher_load else None
    check_tokenizer_file(flags.tokenizer)
    with heavy.imports():
        from megatron_ext.inference import evaluation
    evaluation.evaluate_checkpoint(flags, folder, teacher)


def parse_evaluate(argv: Sequence[str] | None) -> EvaluateFlags:
    """Return the checked flags."""
    flags = parse(EvaluateFlags, sys.argv[1:] if argv is None else argv)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    refuse(
        layout_problems(flags.parallel, flags.batch.seq_length, world_size),
        virtual_stage_problems(flags.parallel),
        precision_problems(flags.precision),
    )
    return replace(flags, parallel=without_idle_sequence_parallel(flags.parallel))


if __name__ == "__main__":
    run_main(main)
