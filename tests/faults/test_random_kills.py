"""Training that is killed at moments that nobody chose goes on, bit for bit.

    FAULT_SEEDS=20 python -m pytest tests/faults/test_random_kills.py

A seed is a run that dies several times: in its imports, in its data, in a step, in a save.
"""

import os
import random
import signal
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron_ext.checkpoint import checkpoints
from tests.models import LLAMA
from tests.programs import (
    assert_same_bytes,
    data_flags,
    model_flags,
    read_metrics,
    read_tensors,
    run_program,
    succeed,
    write_corpus,
    write_model,
)

SEEDS = int(os.environ.get("FAULT_SEEDS", "2"))
DEATHS = 3
STUDENT = replace(LLAMA, hidden_size=32, ffn_hidden_size=48)
STEPS = (
    "--train-iters 6 --global-batch-size 4 --lr 3e-3 --lr-warmup-iters 2 --save-interval 1 "
    "--log-interval 4 --eval-interval 3 --eval-iters 1 --hidden-dropout 0.1 "
)
# Ranks and flags: a model alone, its optimizer spread, a student with hidden states.
RUNS = [
    (1, "{sizes} --bf16"),
    (2, "--load {student} --teacher-load {teacher} --kd-hidden-states last:last"),
    (2, "{sizes} --bf16 --use-distributed-optimizer --overlap-param-gather --overlap-grad-reduce"),
    (2, "--load {student} --teacher-load {teacher} --tensor-model-parallel-size 2"),
]


class Place:
    """Data and models, and each of ``RUNS`` as nothing interrupted it."""

    def __init__(self, root):
        self.root, self.whole = root, {}
        self.corpus = write_corpus(root / "corpus", STUDENT.vocab_size)
        write_model(str(root / "teacher"), LLAMA)
        write_model(str(root / "student"), STUDENT)

    def argv(self, kind, save):
        """Return the flags of ``RUNS[kind]``, with an index cache of its own."""
        names = {"student": self.root / "student", "teacher": self.root / "teacher"}
        line = RUNS[kind][1].format(sizes=" ".join(model_flags(STUDENT)), **names)
        own = f"{STEPS} {line} --save {save} --data-cache-path {save}-cache"
        return [*data_flags(STUDENT, self.corpus), *own.split()]

    def unbroken(self, kind):
        """Return the folder of a run to its end, and the seconds that it took."""
        if kind not in self.whole:
            save, begin = self.root / f"whole{kind}", time.monotonic()
            succeed("pretrain_distill", self.argv(kind, save), RUNS[kind][0])
            self.whole[kind] = save, time.monotonic() - begin
        return self.whole[kind]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


def die_after(delays):
    """Have the kernel end this process: SIGALRM, which nobody handles, is as hard as SIGKILL."""
    delay = delays[torch.distributed.get_rank()]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, delay)


def is_killed(argv, world_size, delays):
    """Run the program; whether it was killed, in place of coming to its end."""
    try:
        run_program("pretrain_distill", argv, world_size, partial(die_after, delays))
    except AssertionError as error:
        if " died" not in str(error) and "onnection" not in str(error):  # the other rank's words
            raise
        return True
    return False


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(seed, place, tmp_path):
    kind, chance, deaths = seed % len(RUNS), random.Random(seed), 0
    world_size = RUNS[kind][0]
    whole, seconds = place.unbroken(kind)
    save = tmp_path / "save"
    for _ in range(DEATHS):
        first = chance.uniform(0.01, 0.9 * seconds)
        delays = [first + chance.choice((0, 0.05, 60)) for _ in range(world_size)]
        delays[chance.randrange(world_size)] = first
        deaths += is_killed(place.argv(kind, save), world_size, delays)
    assert deaths, "it was never killed"
    succeed("pretrain_distill", place.argv(kind, save), world_size)
    assert read_metrics(save) == read_metrics(whole)
    assert checkpoints.find(str(save)).name == checkpoints.iteration_name(6)
    assert_same_bytes(read_tensors(str(save)), read_tensors(str(whole)))
    assert not list(save.glob(".iter*"))
