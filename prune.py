r"""Prune a checkpoint: calibration data -> scores -> plan -> pruned checkpoint.

    torchrun --nproc-per-node 2 prune.py --load teacher --save pruned --target-hidden-size 3072 \
        --tensor-model-parallel-size 2 --data-path corpus --calibration-samples 1024 ...

--scores and --plan name files: one that exists replaces the steps before it, or else is written.
Several models from the same scores: --targets FILE, or --target-params N --search-space FILE for
every model of a search space that has about N parameters.
"""

import os
import sys

from megatron_ext.checkpoint.unpickling import trust
from megatron_ext.cli.programs import parse_prune
from megatron_ext.rehearsal import dry_run, early
from megatron_ext.rehearsal.run_plan import plan_pruning
from megatron_ext.runtime import heavy
from megatron_ext.runtime.errors import run_main


def main() -> int:
    """Run the program; returns its exit code."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    flags = parse_prune(sys.argv[1:], world_size)
    trust(flags.checkpoint.trust_checkpoint)
    plan = plan_pruning(flags, flags.dry.world_size or world_size)
    if flags.dry.dry_run:
        return dry_run.prune(plan)
    early.check_files(plan)
    with heavy.imports():
        from megatron_ext.pruning import run
    return run.prune(plan)


if __name__ == "__main__":
    run_main(main)
