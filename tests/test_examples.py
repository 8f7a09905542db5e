"""The examples' scripts: every step's dry run, how they launch, and what a job does with codes."""

import contextlib
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_ext.runtime.errors import INTERRUPTED
from tests.models import LLAMA
from tests.programs import (
    ROOT,
    data_flags,
    kill_all,
    model_flags,
    run_here,
    wait_until,
    write_corpus,
)

EXAMPLES = sorted(path.parent for path in (ROOT / "examples").glob("*/config.sh"))
COMMON = ROOT / "examples/common"


def steps_of(example):
    (line,) = re.findall(r"^STEPS=\((.*)\)$", (example / "run.sh").read_text(), re.M)
    return line.split()


STEPS = [(example.name, step) for example in EXAMPLES for step in steps_of(example)]


def write_stub(folder, name, body):
    """Write a shell command of this name; ``folder`` goes in front of PATH."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def bash(*words, path=None, **environ):
    """Run bash in the repository without what launchers leave in the environment."""
    clean = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {k: v for k, v in os.environ.items() if k not in clean and "SLURM" not in k}
    front = f"{path}:" if path else ""
    inherited["PATH"] = f"{front}{Path(sys.executable).parent}:{inherited['PATH']}"
    return subprocess.run(
        ["bash", *map(str, words)],
        cwd=ROOT,
        env=inherited | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


def words_of(log):
    """Return the command lines that a stub wrote, its words ended by NUL and lines by a newline."""
    return [line.split("\0")[:-1] for line in log.read_text().splitlines()]


# Every step, as far as a laptop can tell.


def dry_run(name, step, tmp_path, monkeypatch, **environ):
    """Run a step's dry run; returns its code, output and errors, and the command line."""
    log = tmp_path / "log"
    write_stub(tmp_path, "python", 'printf "%s\\0" "$@" >>"$LOG"; echo >>"$LOG"')
    ran = bash(
        ROOT / "examples" / name / "run.sh",
        step,
        path=tmp_path,
        DRY_RUN="1",
        LOG=str(log),
        WORK=str(tmp_path / "work"),
        **environ,
    )
    assert ran.returncode == 0, ran.stderr
    (argv,) = words_of(log)
    monkeypatch.chdir(ROOT)
    return *run_here(argv), argv


def table_row(step, text):
    """Return a step's row of an example's README from what its dry run prints."""
    needs = dict(re.findall(r"^  (\w[\w ]*?) +([\d.]+) GB$", text, re.M))
    kept = sum(float(needs.get(name, 0)) for name in ("weights", "gradients", "optimizer"))
    teacher = float(needs.get("teacher weights", 0))
    rest = float(needs["together"]) - kept - teacher
    step_time = re.search(r"([\d.]+) s (?:a step|for)", text)[1]
    run = re.search(r"([\d.]+) days, ([\d,]+) GPU hours", text)
    length = f"{run[1]} days, {run[2]}" if run else "-"
    return (
        f"| {step} | {kept:.1f} | {teacher:.1f} | {rest:.1f} | {float(needs['together']):.1f} | "
        f"{float(step_time):.1f} s | {length} |"
    )


@pytest.mark.parametrize(("name", "step"), STEPS)
def test_dry_run_of_every_step(name, step, tmp_path, monkeypatch):
    code, stdout, stderr, argv = dry_run(name, step, tmp_path, monkeypatch)
    assert (code, stderr) == (0, ""), stderr
    assert stdout.endswith("OK\n")
    converts = step.startswith(("import", "export"))  # job.sbatch gives these one task
    assert argv[0] == "tools/convert.py" if converts else not argv[0].startswith("tools/")
    if converts:
        return
    assert f"--world-size {128 if 'nemotron' in name else 256}" in " ".join(argv) or "prune" in step
    assert table_row(step, stdout) in (ROOT / "examples" / name / "README.md").read_text()


@pytest.mark.parametrize(
    ("environ", "step", "message"),
    [
        ({"TRAIN_NODES": "5"}, "distil", "--global-batch-size 768 is not a multiple of"),
        ({"HIDDEN": "6000"}, "prune", "--target-hidden-size 6000: choose from 1 to"),
        ({"MICRO_BATCH": "6"}, "distil", "--gpu H100 has 80 GB, the fullest rank needs"),
        ({"LR": "0"}, "distil", "--lr 0.0: must be > 0"),
        ({"SEQ_LENGTH": "8190"}, "distil", "--seq-length 8190 is not a multiple of"),
        ({"DRY_EXTRA": "--gpu K80"}, "distil", "--gpu: invalid choice: 'K80'"),
    ],
)
def test_what_could_not_run_is_said_before(environ, step, message, tmp_path, monkeypatch):
    code, stdout, stderr, _ = dry_run(
        "mistral-nemo-12b-to-8b", step, tmp_path, monkeypatch, **environ
    )
    assert code == 2
    assert stderr.startswith(f"ERROR: {message}"), stderr
    assert stderr.count("\n") == 1
    assert "OK" not in stdout


def test_a_step_that_is_none():
    ran = bash(EXAMPLES[0] / "run.sh", "nonsense", DRY_RUN="1")
    assert ran.returncode == 2
    assert ran.stderr == f"ERROR: step nonsense: choose from {' '.join(steps_of(EXAMPLES[0]))}.\n"


def test_shipped_sizes_are_the_papers(tmp_path, monkeypatch):
    """Parameters of arXiv:2407.14679, Table 10, and 2408.11796, Table 3, counted with norms."""
    counts = {
        ("nemotron-15b-to-8b-to-4b", "prune-8b"): (15_628_775_424, 8_271_699_968),
        ("nemotron-15b-to-8b-to-4b", "prune-4b"): (8_271_699_968, 4_190_509_056),
        ("llama3.1-8b-to-4b", "prune-width"): (8_030_261_248, 4_512_546_816 + 65 * 3072),
        ("llama3.1-8b-to-4b", "prune-depth"): (8_030_261_248, 4_540_334_080 + 33 * 4096),
        ("mistral-nemo-12b-to-8b", "prune"): (12_247_782_400, 8_413_773_824 + 81 * 4096),
    }
    for (name, step), sizes in counts.items():
        folder = tmp_path / f"{name}-{step}"
        folder.mkdir()
        _, stdout, _, _ = dry_run(name, step, folder, monkeypatch)
        found = re.findall(r"([\d,]+) parameters", stdout)
        assert tuple(int(text.replace(",", "")) for text in found) == sizes


# Launching.


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "torchrun --standalone --nproc-per-node 8 prune.py --x"),
        (
            {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "GPUS_PER_NODE": "2"},
            "torchrun --standalone --nproc-per-node 2 prune.py --x",
        ),
        (
            {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
            | {"MASTER_ADDR": "n01", "MASTER_PORT": "20007", "SLURM_RESTART_COUNT": "3"},
            "torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 0 --rdzv-backend c10d "
            "--rdzv-endpoint n01:20007 --rdzv-id 7-3 prune.py --x",
        ),
        (
            {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "16", "SLURM_NNODES": "2"},
            "python prune.py --x",
        ),
        ({"DRY_RUN": "1", "NODES": "3"}, "python prune.py --x --dry-run --world-size 24"),
    ],
)
def test_one_way_to_launch_everywhere(environ, expected, tmp_path):
    for name in ("torchrun", "python"):
        write_stub(tmp_path, name, f'echo {name} "$@"')
    script = f"set -euo pipefail; source {COMMON}/launch.sh; launch prune.py --x"
    ran = bash("-c", script, path=tmp_path, **environ)
    assert (ran.stdout.strip(), ran.returncode) == (expected, 0), ran.stderr


@pytest.mark.parametrize("procid", range(4))
def test_alone_is_one_task_of_many(procid, tmp_path):
    """Regression: with a task per GPU every one of them converted."""
    write_stub(tmp_path, "python", 'echo python "$@" "$SLURM_NTASKS"')
    script = f"set -euo pipefail; source {COMMON}/launch.sh; alone convert.py --x"
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
    ran = bash("-c", script, path=tmp_path, SLURM_PROCID=str(procid), **step)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ("python convert.py --x 1\n" if procid == 0 else "")


def test_alone_outside_of_slurm(tmp_path):
    write_stub(tmp_path, "python", 'echo python "$@"; exit 3')
    script = f"set -euo pipefail; source {COMMON}/launch.sh; alone convert.py --x"
    ran = bash("-c", script, path=tmp_path)
    assert (ran.stdout, ran.returncode) == ("python convert.py --x\n", 3)


@pytest.mark.parametrize(("said", "code"), [("0", 0), ("2", 2), ("75", 75), (None, 1)])
def test_launch_returns_the_programs_code(said, code, tmp_path):
    """torchrun ends with 1 whatever its ranks return; without a word of them it was a crash."""
    says = f'echo {said} >"$EXIT_CODE_FILE"' if said else "true"
    write_stub(tmp_path, "torchrun", f"{says}; exit {0 if said == '0' else 1}")
    script = f"set -euo pipefail; source {COMMON}/launch.sh; launch program.py"
    assert bash("-c", script, path=tmp_path).returncode == code


@pytest.fixture
def training(tmp_path):
    """Return a command line that trains a tiny model for long, and the folder that it saves to."""
    prefix, save = write_corpus(tmp_path / "corpus", LLAMA.vocab_size), str(tmp_path / "save")
    argv = ["pretrain_distill.py", *model_flags(LLAMA), *data_flags(LLAMA, prefix)]
    argv += shlex.split(
        f"--save {save} --save-interval 1000 --train-iters 4000 --lr 1e-3 --global-batch-size 2 "
        "--log-interval 1 --eval-iters 0 --tensor-model-parallel-size 2"
    )
    return argv, Path(save)


def start_launcher(argv, **environ):
    """Start ``launch`` as a process of its own."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", "-c", f"source {COMMON}/launch.sh; launch {shlex.join(argv)}"],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps_done(save):
    path = save / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_two_nodes_train_save_on_a_signal_and_go_on(training, tmp_path):
    """Two launchers as on two nodes of a job, with a rank each, that meet by c10d.

    As SLURM does before the time limit, the signal goes to every process of both.
    """
    argv, save = training
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environ = {
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "GPUS_PER_NODE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    nodes = [start_launcher(argv, **environ) for _ in range(2)]
    try:
        wait_until(lambda: steps_done(save) >= 2 or any(n.poll() is not None for n in nodes))
        for node in nodes:
            for process in [*psutil.Process(node.pid).children(recursive=True), node]:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    os.kill(process.pid, signal.SIGUSR1)
        outputs = [node.communicate(timeout=60)[0] for node in nodes]
    finally:
        for node in nodes:
            kill_all(node)
    assert [node.returncode for node in nodes] == [INTERRUPTED] * 2, outputs
    done = steps_done(save)
    assert 2 <= done < 4000
    assert any(f"stopping after iteration {done}: received SIGUSR1" in text for text in outputs)
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(done)


SAVES_WHEN_TOLD = """
import os, signal, sys, time
from pathlib import Path
from megatron_ext.runtime.errors import run_main

def stop(*_):
    global told
    told = True

def main():
    signal.signal(signal.SIGTERM, stop)
    Path(sys.argv[1] + os.environ["RANK"]).touch()
    while not told:
        time.sleep(0.05)
    time.sleep(1)  # the rest of a step, and the save
    return 75

told = False
run_main(main)
"""


@pytest.mark.parametrize("everyone", [False, True])
def test_sigterm_on_one_machine(everyone, tmp_path):
    """By hand to the launcher alone; or by SLURM, at a preemption, to every process of the step.

    torchrun passes it on and waits for the save.
    """
    program, ready = tmp_path / "program.py", tmp_path / "ready"
    program.write_text(SAVES_WHEN_TOLD)
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"} if everyone else {}
    launcher = start_launcher([str(program), str(ready)], GPUS_PER_NODE="2", **step)
    try:
        wait_until(lambda: all(Path(f"{ready}{rank}").exists() for rank in range(2)))
        told = psutil.Process(launcher.pid).children(recursive=True) if everyone else []
        for process in [*told, launcher]:
            process.send_signal(signal.SIGTERM)
        output = launcher.communicate(timeout=60)[0]
    finally:
        kill_all(launcher)
    assert launcher.returncode == INTERRUPTED, output


# A job of SLURM.


def job(tmp_path, code, step="distil", **environ):
    """Run job.sbatch with commands of SLURM that write down what they are asked."""
    log = tmp_path / "log"
    write_stub(
        tmp_path,
        "scontrol",
        'if [ "$1" = show ]; then printf "n03\\nn04\\n"; else\n'
        'echo "scontrol $*" >>"$LOG"; exit "${REQUEUE_CODE:-0}"; fi',
    )
    write_stub(
        tmp_path, "srun", f'echo "srun $* [$MASTER_ADDR:$MASTER_PORT]" >>"$LOG"; exit {code}'
    )
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[03-04]"}
    ran = bash(
        COMMON / "job.sbatch", "run.sh", step, path=tmp_path, LOG=str(log), **slurm | environ
    )
    assert log.exists(), ran.stderr
    return ran, log.read_text().splitlines()


@pytest.mark.parametrize("code", [0, 1, 2, 137, INTERRUPTED])
def test_a_job_queues_again_on_75_alone(code, tmp_path):
    ran, (srun, *rest) = job(tmp_path, code)
    assert ran.returncode == code
    assert srun.startswith("srun --ntasks-per-node=1 ")
    assert srun.endswith("bash run.sh distil [n03:22345]")
    assert "--container" not in srun
    assert rest == (["scontrol requeue 12345"] if code == INTERRUPTED else [])


def test_a_job_that_cannot_queue_again_says_so(tmp_path):
    ran, _ = job(tmp_path, INTERRUPTED, REQUEUE_CODE="1")
    assert ran.returncode == INTERRUPTED
    assert "ERROR: job 12345 cannot be requeued" in ran.stderr


def test_a_job_in_a_container_with_a_task_per_gpu(tmp_path):
    _, (srun,) = job(
        tmp_path,
        0,
        CONTAINER_IMAGE="/images/m.sqsh",
        CONTAINER_MOUNTS="/lustre:/lustre",
        TASKS_PER_NODE="8",
    )
    assert srun.startswith("srun --ntasks-per-node=8 ")
    assert "--container-image=/images/m.sqsh " in srun
    assert f"--container-mounts={ROOT}:{ROOT},/lustre:/lustre " in srun


@pytest.mark.parametrize("step", ["import", "export-width"])
def test_a_job_that_converts_has_one_task(step, tmp_path):
    """Regression: --wait=120 ends what still works two minutes after the first idle task."""
    _, (srun,) = job(tmp_path, 0, step, TASKS_PER_NODE="8")
    assert srun.startswith("srun --nodes=1 --ntasks=1 --kill-on-bad-exit=0 ")


def test_jobs_wait_for_the_step_before(tmp_path):
    log = tmp_path / "log"
    stub = 'printf "%s\\n" "$*" >>"$LOG"; wc -l <"$LOG"; ' + "true"
    write_stub(tmp_path, "sbatch", stub)
    write_stub(tmp_path, "mkdir", "true")
    ran = bash(
        COMMON / "submit.sh",
        ROOT / "examples/llama3.1-8b-to-4b",
        "import",
        "prune-width",
        "distil-width",
        path=tmp_path,
        LOG=str(log),
        TRAIN_NODES="16",
    )
    assert ran.returncode == 0, ran.stderr
    lines = log.read_text().splitlines()
    nodes = [re.search(r"--nodes=(\d+)", line)[1] for line in lines]
    waits = [re.search(r"--dependency=(\S+)", line)[1] for line in lines]
    assert nodes == ["1", "1", "16"]
    assert waits == ["singleton", "singleton,afterok:1", "singleton,afterok:2"]
    assert lines[2].endswith("examples/llama3.1-8b-to-4b/run.sh distil-width")


def test_the_header_of_jobs():
    """The docs promise a lead before the limit, a queue after preemption, one log."""
    text = (COMMON / "job.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", text, re.M))
    assert options["signal"] == "USR1@600"
    assert options["open-mode"] == "append"
    assert options["dependency"] == "singleton"
    assert options["output"] == "logs/%x-%j.out"
    assert "requeue" in options
