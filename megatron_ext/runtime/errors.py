"""The one exception for what a user can put right, and how it ends a run on every rank.

Exit codes:
    0  done                         3   bad or missing checkpoint, plan or scores file
    1  runtime error                4   bad data
    2  bad or contradictory flags   5   certify: the layout computes something else than one rank
                                    75  interrupted after a good save: start again to go on
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_ext.runtime.slurm import rank_variables

RUNTIME, USAGE, CHECKPOINT, DATA, DIFFERS, INTERRUPTED = 1, 2, 3, 4, 5, 75


class UserError(Exception):
    """Ends the run with one line on rank 0 and ``code`` on every rank.

    Raise it where every rank comes to the same conclusion (flags, files on a shared disk,
    or a value after its collective). A rank that raises alone leaves the others hanging.

    The message names the flag or file, the offending value and the fix.
    """

    def __init__(self, message: str, code: int = RUNTIME):
        super().__init__(message)
        self.code = code


def is_first_rank() -> bool:
    """Whether this process speaks to the user; before and after process groups too."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def warn(message: str) -> None:
    """Print a warning on rank 0."""
    if is_first_rank():
        print(f"WARNING: {message}", file=sys.stderr, flush=True)


def run_main(main: Callable[[], int | None]) -> None:
    """Call ``main`` and exit: with its return value, or with a ``UserError``'s code and one line.

    The code, which is the same on all ranks, also goes into the file that EXIT_CODE_FILE names, if
    it does: torchrun ends with 1 whatever its ranks return. Any other exception is a bug and keeps
    its traceback.
    """
    try:
        _take_rank_of_slurm()
        code = main() or 0
    except UserError as error:
        if is_first_rank():
            print(f"ERROR: {error}", file=sys.stderr, flush=True)
        code = error.code
    if path := os.environ.get("EXIT_CODE_FILE"):
        # Every rank: torchrun ends the others as soon as it sees one that failed.
        try:
            Path(path).write_text(f"{code}\n")
        except OSError as error:
            warn(f"EXIT_CODE_FILE {path} cannot be written: {error}.")
    sys.exit(code)


def _take_rank_of_slurm() -> None:
    try:
        os.environ.update(rank_variables(os.environ))
    except ValueError as error:
        raise UserError(str(error), USAGE) from error
