"""Flags typed on a resume hold or are refused, and every difference is said."""

import pytest

from megatron_ext.runtime.errors import INTERRUPTED
from megatron_ext.training import phase, saving
from tests.programs import NEW_MODEL, run_program

RUN = (
    f"{NEW_MODEL} --global-batch-size 2 --eval-iters 0 --num-workers 0 --log-interval 1 "
    "--train-iters 4 --lr 1e-3 --save-interval 2"
)


def print_groups():
    """Print what the optimizer's groups of parameters hold, once a run is restored."""
    restore = saving.restore

    def restored(run, source):
        restore(run, source)
        for group in run.optimizer.param_groups:
            told = {k: v for k, v in group.items() if k != "params"}
            print("GROUP", {k: told[k] for k in sorted(told)})

    saving.restore = restored


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a --save of each optimizer, stopped half-way."""
    folder = tmp_path_factory.mktemp("resume")
    for name, flags in (("adam", ""), ("sgd", "--optimizer sgd")):
        argv = f"{RUN} {flags} --exit-interval 2 --save {folder / name}"
        (outcome,) = run_program("pretrain_distill", argv.split())
        assert outcome.code == INTERRUPTED, outcome.stderr
    return folder


@pytest.mark.parametrize(
    ("optimizer", "flags", "groups", "rows"),
    [
        ("adam", "", [], []),
        ("adam", "--adam-beta1 0.8", ["'betas': (0.8, 0.999)"], ["--adam-beta1"]),
        ("adam", "--adam-beta2 0.9", ["'betas': (0.9, 0.9)"], ["--adam-beta2"]),
        ("adam", "--adam-eps 1e-5", ["'eps': 1e-05"], ["--adam-eps"]),
        ("adam", "--clip-grad 0.5", [], ["--clip-grad"]),
        ("adam", "--seed 7", [], ["--seed", "samples may come twice"]),
        (
            "adam",
            "--weight-decay 0.5 --lr 1e-4 --min-lr 1e-5 --override-opt-param-scheduler",
            ["'weight_decay': 0.5", "'max_lr': 0.0001", "'min_lr': 1e-05"],
            ["--weight-decay", "--lr ", "--min-lr"],
        ),
        ("sgd", "--optimizer sgd", [], []),
        ("sgd", "--optimizer sgd --sgd-momentum 0.5", ["'momentum': 0.5"], ["--sgd-momentum"]),
    ],
)
def test_what_is_typed_holds_and_is_said(optimizer, flags, groups, rows, saved, tmp_path):
    """Regression: the optimizer's groups kept the saved values while the flags said others."""
    argv = f"{RUN} {flags} --load {saved / optimizer} --save {tmp_path}"
    (outcome,) = run_program("pretrain_distill", argv.split(), 1, print_groups)
    assert outcome.code == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    held = [line for line in lines if line.startswith("GROUP")]
    assert held
    for group in groups:
        assert any(group in line for line in held), held
    said = outcome.stdout.partition("NOTE: going on")[2].partition("\nGROUP")[0]
    assert all(row in said for row in rows), said
    assert len(said.splitlines()) == (2 + sum(row.startswith("--") for row in rows) if rows else 0)


def test_another_objective_is_said():
    """Regression: another loss, temperature or teacher was taken without a word."""
    before = {"kd_loss": "jsd", "kd_temperature": 1.0, "teacher_load": "a", "split": "1,0,0"}
    now = {"kd_loss": "mse", "kd_temperature": 2.0, "teacher_load": "b", "split": "1,0,0"}
    _, *rows = phase.table_of_changes(before, now).splitlines()
    assert len(rows) == 3
    assert all(row.endswith(phase.OBJECTIVE) for row in rows)
    assert not phase.table_of_changes(before, before)
