r"""Is this run's layout right? A minute on a CPU, before a cluster is booked.

    python tools/certify.py [--max-ranks 8] pretrain_distill.py --tensor-model-parallel-size 4 ...
    python tools/certify.py prune.py --pipeline-model-parallel-size 4 ... --world-size 64

Flags behind the program's name are those of the run, as they stand; torchrun and its flags may
stand in front. Without these --world-size says on how many ranks it runs. Sizes come from
checkpoints, from --load-config and --teacher-config (a Hugging Face config.json) or from size
flags. The model is shrunk, and the run's code computes one step, or scores and a plan, on gloo
ranks in float64 and on one rank. Ends with 0, or with 5 if these differ.
"""

import sys
from collections.abc import Sequence

from megatron_ext.certify import command
from megatron_ext.runtime import heavy
from megatron_ext.runtime.errors import run_main
from megatron_ext.runtime.local_ranks import start_server


def main(argv: Sequence[str] | None = None) -> int:
    """Certify what ``argv`` describes; returns the exit code."""
    max_ranks, program, flags = command.split(sys.argv[1:] if argv is None else argv)
    trains = program in command.TRAIN
    find = command.training_trials if trains else command.pruning_trials
    trials, models = find(flags, max_ranks)
    start_server(command.PRELOAD)
    print(command.head(trials, models), flush=True)
    with heavy.imports():
        from megatron_ext.certify import run
    return run.training(trials) if trains else run.pruning(trials)


if __name__ == "__main__":
    run_main(main)
