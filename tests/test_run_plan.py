"""The plan of a run: what a dry run prints and refuses is what the program does and refuses."""

import shlex

import pytest

from megatron_ext.cli.programs import parse_train
from megatron_ext.rehearsal.run_plan import plan_training
from tests.models import LLAMA
from tests.programs import NEW_MODEL, data_flags, fail, run_here, succeed, write_corpus, write_model

RUN = "--train-iters 4 --lr 1e-3 --eval-iters 0"
CUT = "--save {p}/new --calibration-samples 8"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a model of LLAMA's sizes, its data, and a save that did not finish."""
    folder = tmp_path_factory.mktemp("plan")
    write_model(str(folder / "teacher"), LLAMA)
    for name, vocab_size in (("corpus", LLAMA.vocab_size), ("wide", 1000)):
        write_corpus(folder / name, vocab_size)
    (folder / "unfinished/iter_0000003").mkdir(parents=True)
    return folder


def rehearsed(program, argv):
    """Return code and output of a dry run, or its error as ``fail`` does."""
    code, stdout, stderr = run_here([f"{program}.py", "--dry-run", *argv])
    return code, stderr.partition("ERROR: ")[2].rstrip() or stdout


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("pretrain_distill", f"--load {{p}}/teacher --hidden-size 32 {RUN}"),
        ("pretrain_distill", f"--load {{p}}/teacher --save {{p}}/unfinished {RUN}"),
        ("pretrain_distill", f"--load {{p}}/teacher --finetune {RUN} --vocab-size 99"),
        ("pretrain_distill", f"--load {{p}}/teacher --finetune {RUN} --data-path {{p}}/wide"),
        (
            "pretrain_distill",
            f"--load {{p}}/teacher --finetune --teacher-load {{p}}/teacher {RUN} "
            "--kd-hidden-states 9:9",
        ),
        ("pretrain_distill", f"--load {{p}}/teacher --finetune {RUN} --seq-length 1000"),
        ("prune", f"--load {{p}}/teacher {CUT} --target-hidden-size 64"),
        ("prune", f"--load {{p}}/teacher {CUT} --micro-batch-size 3"),
        ("prune", f"--load {{p}}/teacher {CUT} --hidden-size 32"),
        ("prune", f"--load {{p}}/teacher {CUT} --data-path {{p}}/wide"),
    ],
)
def test_a_dry_run_refuses_what_the_program_refuses_in_the_same_words(program, line, place):
    argv = data_flags(LLAMA, str(place / "corpus")) + shlex.split(line.format(p=place))
    assert rehearsed(program, argv) == fail(program, argv)


def test_a_run_that_goes_on(tmp_path):
    """Steps, samples and operations are those that are left; samples count from the first one."""
    line = NEW_MODEL.replace("--train-iters 1", "--train-iters {n}") + "--global-batch-size 2"
    line += f" --save {tmp_path}/a --save-interval 1 --eval-iters 0 --override-opt-param-scheduler"
    first, second = (shlex.split(line.format(n=n)) for n in (2, 5))
    fresh = plan_training(parse_train([*second, "--dry-run"], 1), 1)
    assert (fresh.iteration, fresh.num_steps, fresh.num_samples) == (0, 5, (10, 0, 0))
    succeed("pretrain_distill", first)
    code, said = rehearsed("pretrain_distill", second)
    assert code == 0
    assert "  3 steps = " in said
    assert f"begins      at iteration 2, with all that {tmp_path}/a holds" in said
    assert "data        10 samples for training, 0 for validation, 0 for a test" in said
    assert f"saves       to {tmp_path}/a every 1 steps and at the end" in said
    plan = plan_training(parse_train([*second, "--dry-run"], 1), 1)
    assert plan.flops == pytest.approx(3 / 5 * fresh.flops)
    (outcome,) = succeed("pretrain_distill", second)
    assert "parameters, beginning at 2" in outcome.stdout


def test_where_a_run_begins(place, tmp_path):
    save = f"--save {tmp_path}/new --save-interval 2"
    line = f"--load {place}/teacher --train-iters 4 --lr 1e-3 {save}"
    argv = data_flags(LLAMA, str(place / "corpus"))
    _, said = rehearsed("pretrain_distill", [*argv, *shlex.split(line)])
    assert f"begins      at iteration 0, with the weights of {place}/teacher" in said
    assert f"saves       to {tmp_path}/new every 2 steps and at the end" in said
    _, said = rehearsed("pretrain_distill", shlex.split(NEW_MODEL))
    assert "begins      at iteration 0, with new weights" in said
    assert said.endswith("saves       nothing\nOK\n")
