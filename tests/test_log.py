"""Logs: Weights & Biases, and folders in which nothing can be written."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_ext.checkpoint import checkpoints
from megatron_ext.runtime.errors import USAGE
from megatron_ext.training import log
from tests.models import LLAMA
from tests.programs import data_flags, model_flags, run_program, write_corpus


def fill_the_disk():
    log._reopen = lambda *_: Path("/dev/full").open("a")  # noqa: SIM115


RUN = "--lr 1e-3 --train-iters 3 --save-interval 3 --log-interval 1 --eval-iters 0"


def arguments(folder):
    corpus = write_corpus(folder / "corpus", LLAMA.vocab_size)
    flags = [*data_flags(LLAMA, corpus), *model_flags(LLAMA), *RUN.split()]
    return [*flags, "--save", str(folder / "save")]


class Board:
    """Stands in for the package wandb; prints what it is told."""

    def init(self, config, **settings):
        print("init", settings, config["train_iters"])
        return self

    def log(self, metrics, step):
        print("log", step, sorted(metrics)[:2])

    def finish(self):
        print("finish")


def with_board():
    sys.modules["wandb"] = Board()


class LostBoard(Board):
    """Its connection is lost."""

    def log(self, metrics, step):
        raise ConnectionError("no route")

    def finish(self):
        raise AssertionError("told again")


def with_lost_boards():
    sys.modules["wandb"] = LostBoard()

    def add_scalar(*_):
        raise FileNotFoundError("events")

    SummaryWriter.add_scalar = add_scalar


def with_board_without_key():
    sys.modules["wandb"] = SimpleNamespace(init=lambda **_: 1 / 0)


def without_board():
    sys.modules["wandb"] = None  # importing it fails


def test_weights_and_biases(tmp_path):
    argv = [*arguments(tmp_path), "--wandb-project", "p", "--wandb-exp-name", "n"]
    outcomes = run_program("pretrain_distill", argv, 2, with_board)
    assert [o.code for o in outcomes] == [0, 0], outcomes[0].stderr
    lines = [x for x in outcomes[0].stdout.splitlines() if x.startswith(("init", "log", "finish"))]
    save = str(tmp_path / "save")
    settings = {"project": "p", "name": "n", "entity": None, "dir": save}
    steps = [f"log {step} ['batch-size', 'consumed-samples']" for step in (1, 2, 3)]
    assert lines == [f"init {settings} 3", *steps, "finish"]
    assert "init" not in outcomes[1].stdout


@pytest.mark.parametrize(
    ("before", "code", "words"),
    [
        (without_board, USAGE, "--wandb-project needs wandb, of the extra log"),
        (with_board_without_key, 0, "--wandb-project p: division by zero; nothing is sent there"),
    ],
)
def test_weights_and_biases_that_are_not_there(before, code, words, tmp_path):
    argv = [*arguments(tmp_path), "--wandb-project", "p"]
    outcomes = run_program("pretrain_distill", argv, 2, before)
    assert [o.code for o in outcomes] == [code, code], outcomes[0].stderr
    assert words in outcomes[0].stderr


def test_a_full_disk_costs_metrics_not_the_run(tmp_path):
    """Regression: rank 0 ended with a traceback, and the others waited for it."""
    argv = arguments(tmp_path)
    outcomes = run_program("pretrain_distill", argv, 2, fill_the_disk)
    assert [o.code for o in outcomes] == [0, 0], outcomes[0].stderr
    assert outcomes[0].stderr.count("no metrics are written from here on") == 1
    assert "iteration        3/" in outcomes[0].stdout
    assert checkpoints.find(str(tmp_path / "save"))


def test_boards_that_fail_in_the_middle_cost_metrics_not_the_run(tmp_path):
    """Regression: rank 0 ended with a traceback, and the others waited for it."""
    argv = [*arguments(tmp_path), "--wandb-project", "p", "--tensorboard-dir", str(tmp_path / "t")]
    outcomes = run_program("pretrain_distill", argv, 2, with_lost_boards)
    assert [o.code for o in outcomes] == [0, 0], outcomes[0].stderr
    for words in ("--wandb-project: no route; ", "--tensorboard-dir: events; "):
        assert outcomes[0].stderr.count(words) == 1
    assert len((tmp_path / "save/metrics.jsonl").read_text().splitlines()) == 3
