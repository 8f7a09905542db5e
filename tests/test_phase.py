"""A run that goes on with another batch size, sequence length or blend."""

import math
import shlex

import pytest

from megatron_ext.data import datasets
from megatron_ext.runtime.errors import CHECKPOINT, INTERRUPTED
from megatron_ext.training import phase, saving
from tests.models import LLAMA
from tests.programs import (
    data_flags,
    fail,
    model_flags,
    read_metrics,
    read_tensors,
    run_program,
    succeed,
    write_corpus,
)

NAME = "pretrain_distill"


def flags(corpus, save, extra=""):
    """Return the flags of a run of 8 steps in all; of what is given twice the last holds."""
    run = (
        "--lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 2 --lr-decay-iters 8 "
        "--global-batch-size 4 --train-iters 8 --save-interval 4 --log-interval 1 --eval-iters 0 "
        f"--split 100,0,0 --save {save} {extra}"
    )
    return [*data_flags(LLAMA, corpus), *model_flags(LLAMA), *run.split()]


def say_what_is_restored():
    """Print where the data begin, and the sum of squares of Adam's first moment once restored."""

    def batches(dataset, **kwargs):
        sample = dataset[0]["tokens"]
        print("DATA FROM", kwargs["consumed_samples"], "OF LENGTH", len(sample))
        return data_batches(dataset, **kwargs)

    def restore(run, source):
        original(run, source)
        (part,) = run.optimizer.chained_optimizers
        print("MOMENT", squares(s["exp_avg"] for s in part.optimizer.state.values()))

    data_batches, datasets.batches = datasets.batches, batches
    original, saving.restore = saving.restore, restore


def squares(tensors):
    return f"{float(sum(tensor.double().square().sum() for tensor in tensors)):.8e}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("phase")


@pytest.fixture(scope="module")
def corpora(place):
    return [write_corpus(place / name, LLAMA.vocab_size) for name in "ab"]


def test_phases_keep_optimizer_and_schedule(place, corpora):
    first, second = corpora
    whole, save = str(place / "whole"), str(place / "save")
    succeed(NAME, flags(first, whole))
    # Larger batches of the same data; longer samples of other data, in smaller batches.
    phases = (
        (flags(first, save, "--exit-interval 4"), "DATA FROM 0 OF LENGTH 16", ()),
        (
            flags(first, save, "--global-batch-size 6 --exit-interval 6"),
            "DATA FROM 16 OF LENGTH 16",
            (),
        ),
        (
            flags(second, save, "--global-batch-size 2 --seq-length 24"),
            "DATA FROM 0 OF LENGTH 24",
            ("--seq-length: 16 before, 24 from here on", "--data-path"),
        ),
    )
    for number, (argv, where, warnings) in enumerate(phases):
        tensors = read_tensors(save) if number else {}
        moments = [t for name, t in tensors.items() if "optimizer.state.exp_avg." in name]
        (outcome,) = run_program(NAME, argv, 1, say_what_is_restored)
        assert outcome.code == (0 if number == 2 else INTERRUPTED), outcome.stderr
        assert where in outcome.stdout
        for warning in warnings:
            assert warning in outcome.stderr
        assert warnings or "WARNING" not in outcome.stderr
        if number:
            assert f"MOMENT {squares(moments)}" in outcome.stdout
    ours, theirs = read_metrics(save), read_metrics(whole)
    assert [line["consumed-samples"] for line in ours] == [4, 8, 12, 16, 22, 28, 30, 32]
    for name in ("iteration", "learning-rate"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs])
    assert [line["lm loss"] for line in ours[:4]] == [line["lm loss"] for line in theirs[:4]]


def test_data_that_moved_are_the_same(corpora):
    moved = ["0.5", "/elsewhere/a", "0.5", "/elsewhere/b"]
    assert phase._comparable("data_path", moved) == phase._comparable(
        "data_path", ("0.5", corpora[0], "0.5", corpora[1])
    )
    assert phase._comparable("data_path", moved) != phase._comparable(
        "data_path", ("0.6", "/elsewhere/a", "0.4", "/elsewhere/b")
    )


def test_a_phase_resumes_within_itself(place, corpora):
    """The counter of the present data set is saved too, not the total alone."""
    whole, broken = str(place / "one"), str(place / "other")
    for save in (whole, broken):
        assert run_program(NAME, flags(corpora[0], save, "--exit-interval 4"))[0].code == 75
    longer = "--seq-length 24 --save-interval 1"
    succeed(NAME, flags(corpora[0], whole, longer))
    run_program(NAME, flags(corpora[0], broken, f"{longer} --exit-interval 5"))
    (outcome,) = run_program(NAME, flags(corpora[0], broken, longer), 1, say_what_is_restored)
    assert "DATA FROM 4 OF LENGTH 24" in outcome.stdout
    assert read_metrics(whole) == read_metrics(broken)


def test_another_schedule_is_refused_in_one_line(place, corpora):
    save = str(place / "schedule")
    run_program(NAME, flags(corpora[0], save, "--exit-interval 4"))
    code, message = fail(NAME, flags(corpora[0], save, "--lr 1e-3"))
    assert code == CHECKPOINT
    assert "--override-opt-param-scheduler" in message
    assert "0.001" in message
    assert "0.003" in message
    succeed(NAME, flags(corpora[0], save, "--lr 1e-3 --override-opt-param-scheduler"))
    assert 8e-4 < read_metrics(save)[4]["learning-rate"] < 1e-3


def test_the_saved_schedule_of_other_rates(place, corpora):
    """Regression: rates of the saved groups of parameters held, whatever the schedule said."""
    save = str(place / "saved-schedule")
    run_program(NAME, flags(corpora[0], save, "--exit-interval 4"))
    succeed(NAME, flags(corpora[0], save, "--lr 1e-3 --use-checkpoint-opt-param-scheduler"))
    rates = [line["learning-rate"] for line in read_metrics(save)]
    assert rates[4:] == pytest.approx(
        [2.7e-3 / 2 * (1 + math.cos(math.pi * k / 6)) + 3e-4 for k in range(2, 6)]
    )


def test_larger_batches_of_a_run_in_samples(place, corpora):
    """Regression: steps were counted as if all had been of the present size; it ended early."""
    save = str(place / "samples")
    run = "--train-samples 32 --lr-warmup-samples 8 --global-batch-size"
    of_steps = "--lr-warmup-iters 2 --lr-decay-iters 8 --global-batch-size 4 --train-iters 8 "
    first, second = (
        shlex.split(shlex.join(flags(corpora[0], save, f"{run} {more}")).replace(of_steps, ""))
        for more in ("4 --exit-interval 4", "8")
    )
    (outcome,) = run_program(NAME, first)
    assert outcome.code == INTERRUPTED, outcome.stderr
    succeed(NAME, second)
    lines = read_metrics(save)
    assert [line["consumed-samples"] for line in lines] == [4, 8, 12, 16, 24, 32]
    # Warm-up over 8 samples, then a cosine over the other 24; a step takes the rate it begins at.
    expected = [0, 1.5e-3, 3e-3, *(cosine(done) for done in (4, 8, 16))]
    assert [line["learning-rate"] for line in lines] == pytest.approx(expected)


def cosine(done):
    return 3e-4 + 2.7e-3 * (1 + math.cos(math.pi * done / 24)) / 2
