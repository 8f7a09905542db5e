"""tools/rank_candidates.py: candidates are retrained and ranked by what their runs measured."""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import numpy
import pytest

from megatron_ext.runtime.errors import CHECKPOINT, INTERRUPTED, RUNTIME, USAGE
from tests.models import LLAMA
from tests.programs import (
    ROOT,
    data_flags,
    fail,
    kill_all,
    read_metrics,
    run_program,
    succeed,
    wait_until,
    write_corpus,
    write_model,
)
from tools.rank_candidates import rank_correlation

ARCHS = {
    "narrow": replace(LLAMA, hidden_size=24),
    "shallow": replace(LLAMA, num_layers=2, ffn_hidden_size=48),
}
RUN = (
    "--train-iters 4 --eval-interval 2 --eval-iters 1 --save-interval 4 --log-interval 1 "
    "--global-batch-size 2 --lr 3e-3"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return the folder of a teacher and candidates, and the flags that train them."""
    folder = tmp_path_factory.mktemp("search")
    write_model(str(folder / "teacher"), LLAMA)
    for name, arch in ARCHS.items():
        write_model(str(folder / "candidates" / name), arch)
    corpus = data_flags(LLAMA, write_corpus(folder / "corpus", LLAMA.vocab_size))
    return folder, [*corpus, *RUN.split()]


def arguments(folder, save, flags, **changes):
    own = {"candidates": folder / "candidates", "teacher-load": folder / "teacher", "save": save}
    words = [f"--{name} {value}" for name, value in (own | changes).items()]
    return [*shlex.split(" ".join(words)), "--", *flags]


def test_the_ranking_is_that_of_the_runs(place, tmp_path):
    folder, flags = place
    command = [sys.executable, "tools/rank_candidates.py", *arguments(folder, tmp_path, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ranked = json.loads((tmp_path / "ranking.json").read_text())
    for candidate in ranked:
        metrics = read_metrics(tmp_path / candidate["name"])
        evaluations = [line for line in metrics if "lm loss validation" in line]
        assert candidate["iterations"] == [line["iteration"] for line in evaluations] == [0, 2, 4]
        assert candidate["losses"] == [line["lm loss validation"] for line in evaluations]
        assert candidate["kl"] == [line["kd loss validation"] for line in evaluations]
    assert sorted(c["name"] for c in ranked) == sorted(ARCHS)
    assert ranked[0]["losses"][-1] < ranked[1]["losses"][-1]
    sizes = {c["name"]: c["sizes"] for c in ranked}
    assert sizes == {
        "narrow": {"hidden_size": 24},
        "shallow": {"num_layers": 2, "ffn_hidden_size": 48},
    }
    text = (tmp_path / "ranking.md").read_text()
    assert text.index(ranked[0]["name"]) < text.index(ranked[1]["name"])
    assert f"{ranked[1]['losses'][-1]:.3f}" in text
    assert text.strip() in done.stdout
    assert (tmp_path / "ranking.png").read_bytes().startswith(b"\x89PNG")


def test_a_stop_reaches_the_run_and_leaves_a_checkpoint(place, tmp_path):
    folder, flags = place
    flags = [*flags, "--train-iters", "100000", "--eval-interval", "50000"]
    command = [sys.executable, "tools/rank_candidates.py", *arguments(folder, tmp_path, flags)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        first = tmp_path / "narrow"
        wait_until(lambda: (first / "latest_checkpointed_iteration.txt").exists())
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        kill_all(process)
    assert process.returncode == INTERRUPTED, stderr
    assert "start again to go on" in stderr
    assert not (tmp_path / "shallow").exists()
    assert not (tmp_path / "ranking.md").exists()


def test_a_run_that_stopped_by_itself_under_torchrun(place, tmp_path):
    """Regression: torchrun's 1 was taken for a failure, e.g. with --exit-duration-in-mins."""
    folder, flags = place
    launch = shlex.quote("""bash -c 'echo 75 >"$EXIT_CODE_FILE"; exit 1'""")
    argv = arguments(folder, tmp_path, flags, launch=launch)
    (outcome,) = run_program("tools.rank_candidates", argv)
    assert outcome.code == INTERRUPTED
    assert outcome.stderr == "stopped; start again to go on\n"
    assert list(tmp_path.iterdir()) == []


# In place of torchrun: says what it was started with; unless a run was stopped before, waits for
# SIGTERM and ends as one that has saved, else leaves the metrics of a run that came to its end.
STAND_IN = """
import json, os, pathlib, signal, sys
given = dict(zip(sys.argv, sys.argv[1:]))
save = pathlib.Path(given["--save"])
save.mkdir(exist_ok=True)
ignored = signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
(save / "given").write_text(json.dumps([sys.argv[1:], os.getsid(0), ignored]))
if not (save.parent / "stopped").exists():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    (save / "ready").touch()
    assert signal.sigtimedwait([signal.SIGTERM], 60)
    (save.parent / "stopped").touch()
    if SAID:
        pathlib.Path(os.environ["EXIT_CODE_FILE"]).write_text(str(SAID))
    sys.exit(1)
losses = {"lm loss validation": 3.0, "kd loss validation": 1.0}
lines = [json.dumps({"iteration": i} | losses) for i in (0, 4)]
(save / "metrics.jsonl").write_text("".join(line + chr(10) for line in lines))
"""


def stand_in(folder, code):
    path = folder / "stand_in.py"
    path.write_text(STAND_IN.replace("SAID", str(code)))
    return shlex.join([sys.executable, str(path)])


def signal_when(path, number, **environ):
    """Signal this process as soon as ``path`` is there."""

    def wait_and_signal():
        wait_until(path.exists)
        os.kill(os.getpid(), number)

    os.environ.update(environ)
    threading.Thread(target=wait_and_signal, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_passed_on_and_the_same_command_goes_on(number, place, tmp_path):
    """Regression: SIGUSR1 ended the program, and its run went on alone."""
    folder, flags = place
    argv = arguments(folder, tmp_path, flags, launch=shlex.quote(stand_in(tmp_path, INTERRUPTED)))
    argv.insert(0, "--trust-checkpoint")
    before = partial(signal_when, tmp_path / "narrow" / "ready", number)
    (outcome,) = run_program("tools.rank_candidates", argv, 1, before)
    assert (outcome.code, outcome.stderr) == (INTERRUPTED, "stopped; start again to go on\n")
    assert not (tmp_path / "shallow").exists()
    succeed("tools.rank_candidates", argv)
    ranked = json.loads((tmp_path / "ranking.json").read_text())
    assert sorted(c["name"] for c in ranked) == sorted(ARCHS)
    for name in ARCHS:
        words, session, ignores_usr1 = json.loads((tmp_path / name / "given").read_text())
        assert "--trust-checkpoint" in words
        assert words[-len(flags) :] == flags
        assert session != os.getsid(0)
        assert ignores_usr1  # torchrun knows none and would end


@pytest.mark.parametrize(("said", "code"), [(None, INTERRUPTED), (2, RUNTIME)])
def test_a_stop_hides_no_failure(said, code, place, tmp_path):
    """A run that was not listening yet says nothing; one that says another code has failed."""
    folder, flags = place
    argv = arguments(folder, tmp_path, flags, launch=shlex.quote(stand_in(tmp_path, said)))
    before = partial(signal_when, tmp_path / "narrow" / "ready", signal.SIGTERM)
    (outcome,) = run_program("tools.rank_candidates", argv, 1, before)
    assert outcome.code == code, outcome.stderr


@pytest.mark.parametrize(("number", "is_told"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_in_a_step_of_slurm_a_run_is_told_once(number, is_told, place, tmp_path):
    """SLURM signals every process; two SIGTERM do not leave torchrun the time to save."""
    folder, flags = place
    before = partial(signal_when, tmp_path / "narrow" / "ready", number, SLURM_STEP_ID="0")
    launch = f"timeout --preserve-status --signal KILL 2 {stand_in(tmp_path, INTERRUPTED)}"
    argv = arguments(folder, tmp_path, flags, launch=shlex.quote(launch))
    (outcome,) = run_program("tools.rank_candidates", argv, 1, before)
    assert outcome.code == INTERRUPTED
    assert (tmp_path / "stopped").exists() == is_told
    _, session, _ = json.loads((tmp_path / "narrow" / "given").read_text())
    assert session == os.getsid(0)  # SLURM may know its processes by it


@pytest.mark.parametrize(
    ("flags", "changes", "code", "words"),
    [
        ("--trust-checkpoint", {}, USAGE, "--trust-checkpoint stands before the --"),
        ("--hiden-size 4", {}, USAGE, "--hiden-size (did you mean --hidden-size?)"),
        ("--load x", {}, USAGE, "--load stands before the --"),
        ("--eval-iters 0", {}, USAGE, "candidates are ranked by evaluations"),
        ("", {"candidates": "{folder}/teacher"}, CHECKPOINT, "teacher/release: 1 checkpoints"),
        ("", {"candidates": "/nowhere"}, CHECKPOINT, "--candidates /nowhere: 0 checkpoints"),
        ("", {"launch": "false"}, RUNTIME, "candidate narrow ended with code 1"),
    ],
)
def test_what_is_refused(flags, changes, code, words, place, tmp_path):
    folder, given = place
    changes = {name: value.format(folder=folder) for name, value in changes.items()}
    argv = arguments(folder, tmp_path, [*given, *flags.split()], **changes)
    found, message = fail("tools.rank_candidates", argv)
    assert (found, words.replace("teacher/release", "teacher") in message) == (code, True), message


@pytest.mark.parametrize("values", list(itertools.permutations([1.0, 2.0, 4.0])))
def test_rank_correlation(values):
    other = [3.0, 5.0, 7.0]
    found = rank_correlation(values, other)
    places = numpy.argsort(numpy.argsort(values)), numpy.argsort(numpy.argsort(other))
    assert found == pytest.approx(numpy.corrcoef(*places)[0, 1])
    assert rank_correlation([1.0, 1.0], [2.0, 3.0]) == 0.0
    assert rank_correlation([1.0, 2.0, 2.0], [3.0, 4.0, 4.0]) == pytest.approx(1.0)
