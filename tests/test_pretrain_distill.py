"""pretrain_distill.py as a user runs it: layouts, killed and started again, stopped, refused."""

import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pretrain_distill
from megatron_ext.arch import shape, weights
from megatron_ext.checkpoint import checkpoints
from megatron_ext.runtime.errors import CHECKPOINT, DATA, INTERRUPTED, RUNTIME, USAGE
from megatron_ext.training import loop, saving
from megatron_ext.training import run as run_module
from megatron_ext.training.log import Log
from tests.models import GPT2, LLAMA
from tests.programs import (
    LAYOUTS,
    assert_same_bytes,
    data_flags,
    fail,
    kill_all,
    model_flags,
    read_metrics,
    read_tensors,
    run_program,
    start_process,
    succeed,
    wait_until,
    write_corpus,
    write_model,
)
from tests.ranks import run_ranks

STUDENT = replace(LLAMA, hidden_size=32, ffn_hidden_size=48)
TEACHER = LLAMA
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
NAME = "pretrain_distill"


class Place:
    """A corpus for each vocabulary, a trained teacher and random weights for a student."""

    def __init__(self, folder):
        self.corpus = {
            size: write_corpus(folder / f"corpus{size}", size)
            for size in (STUDENT.vocab_size, GPT2.vocab_size)
        }
        self.teacher, self.pruned = str(folder / "teacher"), str(folder / "pruned")
        argv = [*self.flags(self.teacher), *model_flags(TEACHER), *LAYOUTS["TP2xPP2"][1].split()]
        succeed(NAME, [*argv, "--train-iters", "2", "--lr-warmup-iters", "0"], 4)
        write_model(self.pruned, STUDENT)

    def flags(self, save, extra="", arch=STUDENT):
        """Return the flags of a run of 6 steps, but for the sizes of its model."""
        return [
            *data_flags(arch, self.corpus[arch.vocab_size]),
            *shlex.split(
                "--global-batch-size 4 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine "
                "--lr-warmup-iters 2 --train-iters 6 --save-interval 2 --log-interval 1 "
                f"--eval-interval 2 --eval-iters 1 --save {save} {extra}"
            ),
        ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


def latest(save):
    """Return the iteration that the tracker file names."""
    with contextlib.suppress(OSError):
        return int((Path(save) / checkpoints.TRACKER).read_text())
    return 0


# The layout law, in what is logged: a checkpoint at the end will do.

SAVE_LAST = "--save-interval 6"


@pytest.fixture(scope="module")
def serial(place, tmp_path_factory):
    """Return the metrics of one rank for each kind of run."""

    def run(name):
        save = str(tmp_path_factory.mktemp("serial") / "save")
        succeed(NAME, [*place.flags(save, SAVE_LAST, KINDS[name][0]), *kind_flags(name, place)])
        return read_metrics(save)

    return {name: run(name) for name in KINDS}


# A new model from its seed alone, or a student of a teacher that other ranks wrote.
KINDS = {
    "alone": (STUDENT, ""),
    "tied": (GPT2, ""),
    "distilled": (STUDENT, "--teacher-load {teacher} --kd-temperature 2"),
    "both losses": (STUDENT, "--teacher-load {teacher} --kd-lm-loss-weight 0.5"),
    "jsd": (STUDENT, "--teacher-load {teacher} --kd-loss jsd --kd-loss-weight 2"),
    "tail": (STUDENT, "--teacher-load {teacher} --kd-top-k 9 --kd-top-k-rest tail"),
    "padded otherwise": (
        replace(STUDENT, padded_vocab_size=256),  # under TP2 a rank has none of the teacher's rows
        "--teacher-load {teacher} --kd-lm-loss-weight 0.5",
    ),
    "padded otherwise, fused": (
        replace(STUDENT, padded_vocab_size=102),
        "--teacher-load {teacher} --kd-fused-output",
    ),
}


def kind_flags(name, place):
    arch, extra = KINDS[name]
    return [*model_flags(arch), *extra.format(teacher=place.teacher).split()]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("alone", layout) for layout in ("TP2+SP", "PP2", "PP2xVPP2", "DP2", "CP2")),
        *(("tied", layout) for layout in ("TP2+SP", "PP2")),
        *(("distilled", layout) for layout in LAYOUTS if layout not in ("TP1", "TP2")),
        *(("both losses", layout) for layout in ("TP2", "PP2")),
        ("jsd", "TP2+SP"),
        ("tail", "TP2+SP"),
        ("padded otherwise", "TP2+SP"),
        ("padded otherwise, fused", "TP2xPP2"),
    ],
)
def test_no_layout_changes_a_loss(name, layout, place, serial, tmp_path):
    world_size, flags = LAYOUTS[layout]
    argv = place.flags(tmp_path, f"{flags} {SAVE_LAST}", KINDS[name][0])
    succeed(NAME, [*argv, *kind_flags(name, place)], world_size)
    metrics = read_metrics(tmp_path)
    assert len(metrics) == 6 + 4 + 1, "6 steps, an evaluation after every other one, a test"
    for ours, theirs in zip(metrics, serial[name], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5), layout
    losses = [line["lm loss validation"] for line in metrics if "lm loss validation" in line]
    assert losses[-1] < losses[0] - 0.05, "it learns nothing: nothing is compared"


# The resume law: killed, the same command again, and the same numbers as never killed.


def die_in_step(iteration):
    """Be killed once ``iteration`` is logged, before it is evaluated or saved."""

    def step(self, number, *args, **kwargs):
        log_step(self, number, *args, **kwargs)
        if number == iteration:
            os.kill(os.getpid(), signal.SIGKILL)

    log_step, Log.step = Log.step, step


def assert_same_run(left, right):
    """Compare every logged number and the last checkpoint, optimizer included, bit for bit."""
    assert read_metrics(left) == read_metrics(right)
    assert latest(left) == latest(right) == 6
    assert_same_bytes(read_tensors(left), read_tensors(right))


ALONE, DISTILLED = (" ".join(model_flags(STUDENT)), "--load {pruned} --teacher-load {teacher}")
SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"


@pytest.mark.parametrize(
    ("layout", "extra", "deaths"),
    [
        ("TP1", ALONE, (1, 3, 4, 5)),
        ("TP1", f"{ALONE} --bf16", (3,)),
        ("DP2", f"{DISTILLED} --kd-hidden-states last:last --log-interval 4", (3, 4)),
        ("TP2", f"{ALONE} --bf16", (5,)),
        ("TP2+SP", DISTILLED, (1, 4)),
        ("DP2", DISTILLED, (4,)),
        ("DP2", f"{ALONE} {SHARDED} --bf16", (3,)),
        ("PP2xVPP2", DISTILLED, (3,)),
        ("CP2", ALONE, (3,)),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(layout, extra, deaths, place, tmp_path):
    world_size, flags = LAYOUTS[layout]
    extra = f"{flags} {extra.format(pruned=place.pruned, teacher=place.teacher)} {DROPOUT}"
    extra += " --global-batch-size 2"
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    succeed(NAME, place.flags(whole, extra), world_size)
    for death in deaths:
        with pytest.raises(AssertionError, match="died"):
            run_program(NAME, place.flags(broken, extra), world_size, partial(die_in_step, death))
        assert latest(broken) == (death - 1) // 2 * 2
    succeed(NAME, place.flags(broken, extra), world_size)
    assert_same_run(broken, whole)


def test_a_logged_loss_is_the_mean_over_its_interval(place, tmp_path):
    """Of all losses, and of nothing else; as Megatron-LM prints it."""
    extra = f"{DISTILLED.format(pruned=place.pruned, teacher=place.teacher)} --log-interval "
    extra = f"--kd-hidden-states last:last --kd-lm-loss-weight 0.5 {extra}"
    for name in ("1", "3"):
        succeed(NAME, place.flags(tmp_path / name, extra + name, STUDENT))
    each, lines = (
        [line for line in read_metrics(tmp_path / name) if "grad-norm" in line]
        for name in ("1", "3")
    )
    assert [line["iteration"] for line in lines] == [3, 6]
    names = [name for name in each[0] if name.endswith("loss")]
    assert sorted(names) == ["hidden loss", "kd loss", "lm loss"]
    for line, steps in zip(lines, (each[:3], each[3:]), strict=True):
        means = {name: sum(step[name] for step in steps) / 3 for name in names}
        assert line == {**steps[-1], **means}


def test_a_checkpoint_without_sums_is_gone_on_from(place, tmp_path):
    """Its interval's mean is that of the steps since then."""
    steps = f"{ALONE} --log-interval 1"
    succeed(NAME, place.flags(tmp_path / "each", steps))
    argv = place.flags(tmp_path / "old", f"{ALONE} --log-interval 3")
    run_program(NAME, [*argv, "--exit-interval", "2"], 1, forget_sums)
    succeed(NAME, argv)
    each = read_metrics(tmp_path / "each")
    third = next(line for line in read_metrics(tmp_path / "old") if line["iteration"] == 3)
    assert third in each


def forget_sums():
    def without_sums(run):
        args = saved_args(run)
        del args.logged_loss_sums
        return args

    saved_args, saving.saved_args = saving.saved_args, without_sums


def test_torchrun_killed_at_any_moment(place, tmp_path):
    """Real processes, killed from outside; the run on the ranks of this test goes on from them."""
    extra = f"{ALONE} {DROPOUT} --global-batch-size 8 {LAYOUTS['TP2'][1]}"
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    process = start_process(NAME, place.flags(broken, extra), 2)
    try:
        wait_until(lambda: latest(broken) >= 2)
        assert process.poll() is None
    finally:
        kill_all(process)
    assert 2 <= latest(broken) < 6
    succeed(NAME, place.flags(whole, extra), 2)
    succeed(NAME, place.flags(broken, extra), 2)
    assert_same_run(broken, whole)


def test_a_torn_line_of_metrics_is_dropped(place, tmp_path):
    """A crash of the machine may leave half a line, or zeros, at the end of a file."""
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    succeed(NAME, place.flags(whole, ALONE), 2)
    with pytest.raises(AssertionError, match="died"):
        run_program(NAME, place.flags(broken, ALONE), 2, partial(die_in_step, 3))
    with (Path(broken) / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "lm lo\0\0\0')
    succeed(NAME, place.flags(broken, ALONE), 2)
    assert_same_run(broken, whole)


# Stopped: the step is finished, saved, and code 75 says that there is more to do.


def signal_in_step(iteration, *ranks, times=1, wanted=signal.SIGTERM):
    """Get a signal on some ranks when ``iteration`` is logged."""

    def step(self, number, *args, **kwargs):
        log_step(self, number, *args, **kwargs)
        if number == iteration and torch.distributed.get_rank() in ranks:
            for _ in range(times):
                os.kill(os.getpid(), wanted)

    log_step, Log.step = Log.step, step


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """Return the folder of a run on two ranks that nothing stopped."""
    save = str(tmp_path_factory.mktemp("whole") / "save")
    succeed(NAME, place.flags(save, f"{ALONE} {DROPOUT}"), 2)
    return save


@pytest.mark.parametrize("ranks", [(1,), (0, 1)])
def test_sigterm_to_one_rank_or_all(ranks, place, whole, tmp_path):
    save, extra = str(tmp_path / "save"), f"{ALONE} {DROPOUT}"
    outcomes = run_program(NAME, place.flags(save, extra), 2, partial(signal_in_step, 3, *ranks))
    assert [o.code for o in outcomes] == [INTERRUPTED] * 2
    assert "stopping after iteration 3: received SIGTERM" in outcomes[0].stdout
    assert latest(save) == 3
    succeed(NAME, place.flags(save, extra), 2)
    assert_same_run(save, whole)


def interrupt_in_step(iteration, times):
    signal_in_step(iteration, 0, times=times, wanted=signal.SIGINT)


def test_ctrl_c_and_its_echo_leave_a_checkpoint(place, tmp_path):
    save = str(tmp_path / "save")
    before = partial(interrupt_in_step, 3, 2)
    (outcome,) = run_program(NAME, place.flags(save, ALONE), 1, before)
    assert (outcome.code, latest(save)) == (INTERRUPTED, 3)
    assert "received SIGINT" in outcome.stdout


def test_the_third_ctrl_c_ends_the_run_at_once(place, tmp_path):
    save = str(tmp_path / "save")
    with pytest.raises(AssertionError, match="KeyboardInterrupt"):
        run_program(NAME, place.flags(save, ALONE), 1, partial(interrupt_in_step, 3, 3))
    assert latest(save) == 2


def signal_in_evaluation(batch):
    """Get SIGTERM on rank 1 in an evaluation behind the first."""

    def counted(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    evaluate, loop.evaluate, left = loop.evaluate, counted, batch


def test_sigterm_in_an_evaluation(place, whole, tmp_path):
    """Regression: the evaluation came to its end first, longer than a launcher waits."""
    save, extra = str(tmp_path / "save"), f"{ALONE} {DROPOUT}"
    first = f"{extra} --eval-iters 9"  # 9 batches before the first step
    outcomes = run_program(NAME, place.flags(save, first), 2, partial(signal_in_evaluation, 12))
    assert [o.code for o in outcomes] == [INTERRUPTED] * 2
    assert "leaving the validation after 3 of 9 batches" in outcomes[0].stdout
    assert latest(save) == 2
    succeed(NAME, place.flags(save, extra), 2)
    assert_same_bytes(read_tensors(save), read_tensors(whole))


def test_sigterm_to_a_process(place, tmp_path):
    """A scheduler signals the whole job: the process group, with its data loader workers."""
    save, extra = str(tmp_path / "save"), f"{ALONE} --global-batch-size 16 --num-workers 1"
    process = start_process(NAME, place.flags(save, extra))
    try:
        wait_until(lambda: latest(save) >= 2)
        os.killpg(process.pid, signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        kill_all(process)
    assert process.returncode == INTERRUPTED, stderr
    assert f"stopping after iteration {latest(save)}: received SIGTERM" in stdout
    assert 2 <= latest(save) < 6
    assert "Traceback" not in stderr
    assert "ERROR" not in stderr


def test_exit_interval(place, whole, tmp_path):
    save = str(tmp_path / "save")
    argv, codes = place.flags(save, f"{ALONE} {DROPOUT} --exit-interval 3"), []
    for iteration in (3, 6):
        codes.append([o.code for o in run_program(NAME, argv, 2)])
        assert latest(save) == iteration
    assert codes == [[INTERRUPTED] * 2, [0] * 2]
    assert_same_run(save, whole)


def be_late_on_rank_1():
    """Let the clock of the second rank run a minute ahead with every look at it."""
    hurry = 60.0 * torch.distributed.get_rank()
    looks = iter(range(10**6))
    loop.time = SimpleNamespace(perf_counter=lambda: time.perf_counter() + hurry * next(looks))


def test_exit_duration(place, whole, tmp_path):
    save = str(tmp_path / "save")
    argv = place.flags(save, f"{ALONE} {DROPOUT} --exit-duration-in-mins 1")
    outcomes = run_program(NAME, argv, 2, be_late_on_rank_1)
    assert [o.code for o in outcomes] == [INTERRUPTED] * 2
    assert "stopping after iteration 1: --exit-duration-in-mins 1" in outcomes[0].stdout
    assert latest(save) == 1
    succeed(NAME, argv, 2)
    assert_same_run(save, whole)


def test_a_finished_run_has_nothing_to_do(place, whole, tmp_path):
    save = str(tmp_path / "save")
    shutil.copytree(whole, save)

    def state():
        return {p: p.stat().st_mtime_ns for p in Path(save).rglob("*") if p.parent != Path(save)}

    before = state()
    succeed(NAME, place.flags(save, f"{ALONE} {DROPOUT}"), 2)
    assert state() == before
    assert_same_run(save, whole)


# A loss that is not finite.


@pytest.mark.parametrize("extra", [ALONE, DISTILLED], ids=["alone", "distilled"])
def test_divergence_stops_the_run(extra, place, tmp_path):
    extra = extra.format(pruned=place.pruned, teacher=place.teacher)
    extra += " --lr 1e30 --lr-warmup-iters 0 --clip-grad 0 --save-interval 1"
    code, message = fail(NAME, place.flags(tmp_path, extra), 2)
    assert code == RUNTIME
    assert "iteration 2 (training samples 4 to 7)" in message
    assert str(tmp_path) in message
    assert "\n" not in message
    assert latest(tmp_path) == 1
    assert all(tensor.isfinite().all() for tensor in read_tensors(tmp_path).values())
    assert max(line["iteration"] for line in read_metrics(tmp_path)) == 1


def poison(model):
    model.decoder.layers[1].mlp.linear_fc2.weight[3, 5] = float("nan")


@pytest.mark.parametrize("role", ["--load", "--teacher-load"])
def test_nan_weights_stop_the_run(role, place, tmp_path):
    load, save = str(tmp_path / "nan"), tmp_path / "save"
    write_model(load, STUDENT, poison)
    extra = f"--load {place.pruned} {role} {load} --eval-iters 0"
    code, message = fail(NAME, place.flags(save, extra), 2)
    assert code == CHECKPOINT
    assert f"{load}/release: decoder.layers.1.mlp.linear_fc2.weight has NaN" in message
    assert "\n" not in message
    assert checkpoints.find(str(save)) is None


# Distillation.


def train_and_look(argv):
    """Return what is true of the teacher after a run."""
    seen = {}

    def train(run, **kwargs):
        teachers = [p for chunk in run.model for p in chunk.module.teacher.parameters()]
        students = [p for chunk in run.chunks for p in chunk.parameters()]
        before = [p.clone() for p in teachers]
        code = original(run, **kwargs)
        trained = [p for group in run.optimizer.param_groups for p in group["params"]]
        buffers = [b for chunk in run.model for b in chunk.buffers]
        seen["unchanged"] = all(map(torch.equal, before, teachers))
        seen["no gradients"] = not any(
            p.requires_grad or p.grad is not None or hasattr(p, "main_grad") for p in teachers
        )
        seen["only students"] = {id(p) for p in trained} == {id(p) for p in students}
        seen["buffers"] = {id(p) for b in buffers for p in b.params} == {id(p) for p in students}
        return code

    original, run_module.train = run_module.train, train
    sys.argv = [f"{NAME}.py", *argv]
    assert pretrain_distill.main() == 0
    return seen


@pytest.mark.parametrize("layout", ["TP1", "PP2"])
def test_the_teacher_is_frozen_and_not_saved(layout, place, tmp_path):
    world_size, flags = LAYOUTS[layout]
    extra = DISTILLED.format(pruned=place.pruned, teacher=place.teacher)
    for seen in run_ranks(world_size, train_and_look, place.flags(tmp_path, f"{flags} {extra}")):
        assert all(seen.values()), seen
    sizes = {key: tuple(tensor.shape) for key, tensor in read_tensors(tmp_path).items()}
    assert {key: size for key, size in sizes.items() if not key.startswith("optimizer")} == {
        w.key: (STUDENT.num_layers,) * w.per_layer + shape(w, STUDENT) for w in weights(STUDENT)
    }


@pytest.mark.parametrize("layout", ["TP1", "TP2+SP", "PP2"])
def test_a_student_equal_to_its_teacher_stays_so(layout, place, tmp_path):
    world_size, flags = LAYOUTS[layout]
    extra = f"--load {place.teacher} --finetune --teacher-load {place.teacher} --weight-decay 0"
    succeed(NAME, place.flags(tmp_path, f"{flags} {extra}"), world_size)
    for line in read_metrics(tmp_path):
        assert max(line.get("kd loss", 0), line.get("kd loss validation", 0)) < 1e-6
        assert line.get("grad-norm", 0) < 1e-6


def test_a_run_in_samples_and_collecting_by_hand(place, whole, tmp_path):
    """The same steps counted in samples, with Python's garbage collected at fixed steps."""
    in_steps = {"--train-iters": "--train-samples", "--lr-warmup-iters": "--lr-warmup-samples"}
    argv = place.flags(tmp_path, f"{ALONE} {DROPOUT} --manual-gc --manual-gc-interval 2")
    for name, other in in_steps.items():
        where = argv.index(name)
        argv[where : where + 2] = [other, str(4 * int(argv[where + 1]))]
    succeed(NAME, argv, 2)
    assert read_metrics(tmp_path) == read_metrics(whole)
    assert_same_bytes(read_tensors(tmp_path), read_tensors(whole))


# What is refused: one line on rank 0, one code on every rank.


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        ("{alone} --hiden-size 8", USAGE, ["--hiden-size", "--hidden-size"]),
        ("--num-layers 2", USAGE, ["--hidden-size", "--num-attention-heads"]),
        (
            "{alone} --num-attention-heads 3 --num-query-groups 3 --tensor-model-parallel-size 2",
            USAGE,
            ["--tensor-model-parallel-size 2", "--num-attention-heads, 3"],
        ),
        ("{alone} --load {tmp}/empty", CHECKPOINT, ["--load {tmp}/empty"]),
        ("--load {pruned} --vocab-size 64", CHECKPOINT, ["100 tokens", "64"]),
        ("--load {pruned} --hidden-size 40", CHECKPOINT, ["--hidden-size", "40", "32"]),
        ("{alone} --teacher-load {tmp}/empty", CHECKPOINT, ["{tmp}/empty"]),
        ("{alone} --teacher-load {damaged}", CHECKPOINT, ["{damaged}", ".distcp", "damaged"]),
        ("--load {damaged}", CHECKPOINT, ["{damaged}", ".distcp", "damaged"]),
        ("{alone} --teacher-load {pruned} --kd-top-k 101", USAGE, ["--kd-top-k 101", "100 tokens"]),
        ("{alone} --data-path {tmp}/none", DATA, ["{tmp}/none.idx", "no such file"]),
        ("{alone} --save {tmp}/file", RUNTIME, ["{tmp}/file"]),
    ],
)
def test_what_is_refused(extra, code, words, place, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "empty").mkdir()
    damaged = shutil.copytree(place.pruned, tmp_path / "damaged")
    shard = next(damaged.rglob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    places = {"tmp": tmp_path, "alone": ALONE, "pruned": place.pruned, "damaged": damaged}
    result, message = fail(NAME, place.flags(tmp_path / "save", extra.format(**places)), 2)
    assert result == code, message
    assert all(word.format(**places) in message for word in words), message
    assert checkpoints.find(str(tmp_path / "save")) is None


def test_an_error_under_torchrun(place, tmp_path):
    argv = place.flags(tmp_path / "save", f"{ALONE} --load {tmp_path}")
    process = start_process(NAME, argv, 2)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    (error,) = [line for line in (stdout + stderr).splitlines() if line.startswith("ERROR: ")]
    assert f"--load {tmp_path}" in error
    assert f"exitcode  : {CHECKPOINT} " in stderr
    assert f'{NAME}.py", line' not in stderr
