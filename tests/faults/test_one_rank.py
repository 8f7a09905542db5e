"""A fault of one rank is said, with its rank and host, and ends all of them."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from megatron_ext.runtime import errors, lost_ranks
from megatron_ext.runtime.errors import CHECKPOINT, RUNTIME, USAGE, UserError
from megatron_ext.runtime.lost_ranks import noted
from tests.programs import NEW_MODEL, ROOT, fail, run_program
from tests.ranks import run_ranks

RANK_1 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}


def run_alone(code, **environ):
    """Run Python as a rank whose launcher set ``environ``; returns its code and its errors."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "SLURM"))}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean | environ, capture_output=True, text=True
    )
    return ended.returncode, ended.stderr


def program(argv):
    return (
        "import sys, pretrain_distill; from megatron_ext.runtime import errors\n"
        f"errors.PATIENCE, sys.argv[1:] = 0.1, {argv.split()}\n"
        "errors.run_main(pretrain_distill.main)"
    )


@pytest.mark.parametrize(
    ("argv", "code"), [(f"{NEW_MODEL} --load /none", CHECKPOINT), ("--no-such 1", USAGE)]
)
def test_before_ranks_have_joined(argv, code):
    """Regression: a rank other than 0 said nothing at all."""
    ended, said = run_alone(program(argv), **RANK_1, MASTER_PORT="1")
    assert ended == code
    (line,) = [line for line in said.splitlines() if "ERROR" in line]
    assert line.startswith(f"ERROR: rank 1 on {socket.gethostname()}: ")


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "abc"), ("RANK", ""), ("LOCAL_RANK", "-1"), ("RANK", "1.5")]
)
def test_a_launcher_that_says_nonsense(name, value):
    """Regression: WORLD_SIZE=abc was a traceback."""
    ended, said = run_alone(program(NEW_MODEL), **RANK_1 | {"MASTER_PORT": "1", name: value})
    assert ended == USAGE
    assert f"{name}={value} is no number" in said
    assert "Traceback" not in said


def test_ranks_that_never_come():
    """Regression: rank 0 ended in a DistStoreError's traceback."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = (
        "from megatron_ext.runtime import errors, platform\n"
        "errors.run_main(lambda: platform._init_process_group('gloo', 1 / 60))"
    )
    ended, said = run_alone(code, **RANK_1 | {"RANK": "0", "MASTER_PORT": str(port)})
    assert ended == RUNTIME, said
    assert "Traceback" not in said
    line = said[said.index("ERROR: ") :]
    assert f"localhost:{port}" in line
    assert "1/2 clients joined" in line


def raise_on(ranks, seconds):
    """Raise on some ranks while the others are busy for some time; returns nothing."""
    errors.PATIENCE = 0.5

    def main():
        if torch.distributed.get_rank() in ranks:
            raise UserError("seven", RUNTIME)
        time.sleep(seconds)

    import pretrain_distill

    pretrain_distill.main = main


def raise_on_rank_1():
    raise_on({1}, 2)


def raise_late_on_rank_0():
    raise_on({0, 1, 2}, 0)
    if torch.distributed.get_rank() == 0:
        ready, errors.is_first_rank = errors.is_first_rank, lambda: time.sleep(0.2) or ready()


def test_after_ranks_have_joined():
    outcomes = run_program("pretrain_distill", [], 3, raise_on_rank_1)
    assert [o.code for o in outcomes] == [0, RUNTIME, 0]
    assert outcomes[1].stderr == f"ERROR: rank 1 on {socket.gethostname()}: seven\n"


def test_what_all_ranks_say_rank_0_says():
    """The others wait until it has: torchrun ends rank 0 as soon as it sees one that ended."""
    assert fail("pretrain_distill", [], 3, raise_late_on_rank_0) == (RUNTIME, "seven")


def end_after_rank_0():
    """Return when each rank ended, of an error that rank 0 is slow to say."""
    raise_late_on_rank_0()
    import pretrain_distill

    with pytest.raises(SystemExit):
        errors.run_main(pretrain_distill.main)
    return time.time()


def test_nobody_ends_before_rank_0_has_spoken():
    first, *others = run_ranks(3, end_after_rank_0)
    assert all(end > first - 0.05 for end in others)


def lose_rank_1():
    """Let rank 1 of 3 be gone while the others are in a collective."""
    errors.PATIENCE = 0.5

    def main():
        if torch.distributed.get_rank() == 1:
            torch.distributed.destroy_process_group()
            time.sleep(2)  # as one that hangs: its process is there
            return
        with noted("iteration 7"):
            torch.distributed.all_reduce(torch.ones(1))

    import pretrain_distill

    pretrain_distill.main = main


def test_a_rank_that_is_lost_is_named():
    """Regression: the others ended with gloo's traceback, which names nobody."""
    first, _, last = run_program("pretrain_distill", [], 3, lose_rank_1)
    assert (first.code, last.code) == (RUNTIME, RUNTIME)
    assert first.stderr.startswith("ERROR: rank 1 does not answer in iteration 7 (")
    assert first.stderr.count("\n") == 1
    assert last.stderr == ""


def test_other_errors_are_bugs():
    """What is no lost connection keeps its traceback."""
    assert lost_ranks.explain(RuntimeError("mat1 and mat2 shapes"), None, 0, 2) is None
    assert lost_ranks.explain(RuntimeError("Connection closed by peer"), None, 0, 1) is None
    line = lost_ranks.explain(RuntimeError("x\nTimed out waiting 1s"), None, 0, 2)
    assert line.startswith("a rank does not answer (Timed out waiting 1s): ")
