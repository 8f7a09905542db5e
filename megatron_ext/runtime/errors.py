"""The one exception for what a user can put right, and how it ends a run on every rank.

Exit codes:
    0  done                         3   bad or missing checkpoint, plan or scores file
    1  runtime error                4   bad data
    2  bad or contradictory flags   5   certify, convert check: what should be equal differs
                                    75  interrupted after a good save: start again to go on
"""

import contextlib
import errno
import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from socket import gethostname
from typing import Any, NoReturn

from megatron_ext.runtime import lost_ranks
from megatron_ext.runtime.slurm import rank_variables

RUNTIME, USAGE, CHECKPOINT, DATA, DIFFERS, INTERRUPTED = 1, 2, 3, 4, 5, 75
RANK_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
PATIENCE = 5.0
"""Seconds that a rank which failed gives rank 0 to say the same."""
SAID = "megatron_ext/rank 0 has said its error"
NO_MEMORY = r"can't allocate memory|out of memory"
READER_ENDED = r"DataLoader worker .*(exited unexpectedly|killed by signal|shared memory)"


class UserError(Exception):
    """Ends the run with one line and ``code`` on every rank: rank 0 says it, for all of them.

    Raise it where every rank comes to the same conclusion (flags, files on a shared disk,
    or a value after its collective). A rank that raises alone leaves the others hanging.

    The message names the flag or file, the offending value and the fix.
    """

    def __init__(self, message: str, code: int = RUNTIME):
        super().__init__(_with_one_stop(message))
        self.code = code


def _with_one_stop(message: str) -> str:
    """Return ``message`` with one full stop: libraries end their reasons with one, or not."""
    return re.sub(r"(?<!\.)\.\.$", ".", message)


def is_first_rank() -> bool:
    """Whether this process speaks to the user; before and after process groups too."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def warn(message: str) -> None:
    """Print a warning on rank 0."""
    if is_first_rank():
        print(f"WARNING: {_with_one_stop(message)}", file=sys.stderr, flush=True)


def note(message: str) -> None:
    """Print what is worth knowing on rank 0; nothing is wrong."""
    if is_first_rank():
        print(f"NOTE: {_with_one_stop(message)}", flush=True)


def run_main(main: Callable[[], int | None]) -> None:
    """Call ``main`` and exit: with its return value, or with a ``UserError``'s code and one line.

    The code, which is the same on all ranks, also goes into the file that EXIT_CODE_FILE names, if
    it does: torchrun ends with 1 whatever its ranks return. Any other exception is a bug and keeps
    its traceback.
    """
    sys.stdout, sys.stderr = _Lasting(sys.stdout), _Lasting(sys.stderr)
    try:
        _take_rank_of_slurm()
        _check_rank_numbers()
        code = main() or 0
    except UserError as error:
        _end(error)
    except (RuntimeError, OSError, MemoryError) as error:
        line = _of_the_machine(error)
        if line is None:
            raise
        _end(UserError(line, RUNTIME))
    _write_code(code)
    sys.exit(code)


def _of_the_machine(error: Exception) -> str | None:
    """Return one line about what a machine has done to the run, or None if ``error`` is a bug."""
    if "oo many open files" in str(error):
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"too many open files, of {most} that a process may have: raise ulimit -n."
    if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
        reason = str(error).splitlines()[0] if str(error) else "no more is there"
        return f"out of memory ({reason[:200]}): --dry-run says what a run takes."
    if re.search(READER_ENDED, str(error)) or _is_of_semaphores(error):
        return (
            "a process that reads data has ended: /dev/shm is full (containers: --shm-size), or "
            "memory is; --num-workers 0 does without such processes."
        )
    if not isinstance(error, RuntimeError):  # torch's, of a collective
        return None
    rank, world_size = (int(os.environ.get(x, y)) for x, y in (("RANK", 0), ("WORLD_SIZE", 1)))
    return lost_ranks.explain(error, _store_of_ranks(), rank, world_size)


def _is_of_semaphores(error: Exception) -> bool:
    """Whether there is no space for the semaphores between this process and others."""
    frames = traceback.extract_tb(error.__traceback__)
    is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return is_full and any("multiprocessing" in frame.filename for frame in frames)


def _end(error: UserError) -> NoReturn:
    # Before it is said: torchrun ends the others as soon as it sees one rank that failed.
    _write_code(error.code)
    _say(error)
    sys.exit(error.code)


class _Lasting:
    """stdout or stderr whose loss ends no run: what nobody reads any more goes to /dev/null.

    ``... | head`` closes its pipe, a terminal hangs up, a log's disk fills: what is learnt is worth
    more than what is said of it.
    """

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write ``text`` if it is read."""
        self._do(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        self._do(self.stream.flush)

    def _do(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError:
            # What is buffered is written at the end of the process: not to where it fails again.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def _say(error: UserError) -> None:
    """Print ``error`` on rank 0; elsewhere only if rank 0 does not.

    A rank that waits for rank 0 also keeps torchrun from ending rank 0 before it has spoken.
    """
    if is_first_rank():
        print(f"ERROR: {error}", file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):
            if store := _store_of_ranks():
                store.set(SAID, "1")
    elif not _first_rank_says():
        who = f"rank {os.environ.get('RANK', os.environ.get('SLURM_PROCID'))} on {gethostname()}"
        print(f"ERROR: {who}: {error}", file=sys.stderr, flush=True)


def _first_rank_says() -> bool:
    """Whether rank 0 says that it failed too, within ``PATIENCE``.

    Before ranks have joined nobody tells: torchrun ends this process meanwhile if rank 0 ends.
    """
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            store = _store_of_ranks()
            if store and store.check([SAID]):
                return True
        except RuntimeError:  # the store ended with rank 0
            return True
        time.sleep(0.05)
    return False


def _store_of_ranks() -> Any:
    """Return what ranks that have joined exchange small things through, or None."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def _write_code(code: int) -> None:
    if path := os.environ.get("EXIT_CODE_FILE"):
        try:
            Path(path).write_text(f"{code}\n")
        except OSError as error:
            warn(f"EXIT_CODE_FILE {path} cannot be written: {error}.")


def _take_rank_of_slurm() -> None:
    try:
        os.environ.update(rank_variables(os.environ))
    except ValueError as error:
        raise UserError(str(error), USAGE) from error


def _check_rank_numbers() -> None:
    for name in RANK_NUMBERS:
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdecimal()):
            raise UserError(
                f"{name}={value} is no number: leave it to torchrun or srun, or unset it.", USAGE
            )
