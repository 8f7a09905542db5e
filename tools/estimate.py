r"""Memory and time of a training run by arithmetic on its sizes: no weights, ranks or GPU.

    python tools/estimate.py --load-config student.json --teacher-config teacher.json \
        --world-size 256 --gpu H100 --tensor-model-parallel-size 2 --sequence-parallel \
        --seq-length 8192 --micro-batch-size 1 --global-batch-size 1152 --train-iters 9961 --bf16

Flags are those of pretrain_distill.py, which says the same with --dry-run and checks data and
tokenizer too. Sizes come from checkpoints (--load, --teacher-load), from config.json files or from
size flags. Nothing is refused for want of memory: the table says what is missing.
"""

import os
import sys
from collections.abc import Sequence

from megatron_ext.checkpoint.unpickling import trust
from megatron_ext.cli.programs import parse_train
from megatron_ext.rehearsal import cost_report as report
from megatron_ext.rehearsal.run_plan import plan_training
from megatron_ext.runtime.errors import run_main
from megatron_ext.runtime.gpus import GPUS

# What a run needs and an estimate does not.
UNASKED = {"--lr": "1", "--train-iters": "1", "--tokenizer-type": "NullTokenizer"}
DATA = ("--data-path", "--train-data-path", "--mock-data")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the estimate of what ``argv`` describes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    typed = {word.partition("=")[0] for word in argv}
    iters_given = bool(typed & {"--train-iters", "--train-samples"})
    in_samples = {"--train-iters"} if "--train-samples" in typed else set()
    added = [f"{k}={value}" for k, value in UNASKED.items() if k not in typed | in_samples]
    added += [] if typed & set(DATA) else ["--mock-data"]
    if "--tokenizer-type" not in typed and "--vocab-size" not in typed:
        added.append("--vocab-size=1")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    flags = parse_train([*argv, "--dry-run", *added], world_size)
    trust(flags.checkpoint.trust_checkpoint)
    plan = plan_training(flags, flags.dry.world_size or world_size)
    text, needs = report.of_training(plan)
    print(text)
    if iters_given:
        print(report.whole_run(plan))
    print(report.fit_line(needs, GPUS))


if __name__ == "__main__":
    run_main(main)
