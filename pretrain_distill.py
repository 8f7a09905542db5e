"""Train a language model alone, or distil it from a teacher in the same parallel groups.

    torchrun --nproc-per-node 2 pretrain_distill.py --load pruned --teacher-load teacher --save out

Flags are Megatron-LM's (--help). Sizes come from the checkpoint; only a new model needs them typed.
Started again with the same command, a run goes on from its last checkpoint in --save.
"""

import os
import sys

from megatron_ext.checkpoint.unpickling import trust
from megatron_ext.cli.programs import parse_train
from megatron_ext.rehearsal import dry_run, early
from megatron_ext.rehearsal.run_plan import plan_training
from megatron_ext.runtime import heavy
from megatron_ext.runtime.errors import run_main


def main() -> int:
    """Run the program; returns its exit code."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    flags = parse_train(sys.argv[1:], world_size)
    trust(flags.checkpoint.trust_checkpoint)
    plan = plan_training(flags, flags.dry.world_size or world_size)
    if flags.dry.dry_run:
        return dry_run.train(plan)
    early.check_files(plan)
    with heavy.imports():
        from megatron_ext.training import run
    return run.pretrain(plan)


if __name__ == "__main__":
    run_main(main)
