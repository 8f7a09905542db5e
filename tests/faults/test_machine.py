"""Faults of a machine: streams and disks that are lost, two runs at once, other users."""

import ctypes
import fcntl
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_ext.distillation import losses_c
from megatron_ext.runtime import compiled
from megatron_ext.runtime.errors import DATA, RUNTIME, UserError, _Lasting
from megatron_ext.runtime.files import LOCK, give_lock_back, hold, take_lock
from tests.models import LLAMA
from tests.programs import (
    NEW_MODEL,
    ROOT,
    fail,
    read_metrics,
    succeed,
    wait_until,
    write_model,
)
from tests.ranks import run_ranks

RUN = f"{NEW_MODEL} --global-batch-size 1 --eval-iters 0 --num-workers 0 --log-interval 1"

# ---------------------------------------------------------------- a folder that two runs write


def try_to_hold(folder):
    try:
        hold(folder, "--save")
    except UserError as error:
        return error.code, str(error)
    return 0, ""


def test_one_run_at_a_time(tmp_path):
    """Regression: both died or lost metrics; what a killed run leaves is no lock."""
    save = tmp_path / "save"
    (held,) = run_ranks(1, try_to_hold, str(save))
    assert held == (0, "")
    assert (save / LOCK).exists()
    hold(save, "--save")
    hold(f"{save}/../save", "--save")  # by the same process
    ((code, message),) = run_ranks(1, try_to_hold, str(save))
    assert code == RUNTIME
    assert f"pid {os.getpid()} " in message
    argv = [*RUN.split(), "--save", str(save), "--save-interval", "1"]
    code, message = fail("pretrain_distill", argv)
    assert code == RUNTIME, message
    assert f"--save {save} is in use by another run" in message
    assert f"pid {os.getpid()} " in message
    assert sorted(path.name for path in save.iterdir()) == [LOCK]
    give_lock_back(save / LOCK)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Return a checkpoint, its Hugging Face folder and text: what publishing programs read."""
    root = tmp_path_factory.mktemp("places")
    write_model(str(root / "model"), LLAMA)
    export = f"export --load {root}/model --hf {root}/hf --model-type llama"
    succeed("tools.convert", export.split())
    (root / "in.jsonl").write_text('{"text": "1 2 3"}\n')
    return root


# program, its flags, the lock, the flag that names it; {new} is what would appear
PUBLISHING = [
    (
        "prune",
        "--load {root}/model --save {new} --target-ffn-hidden-size 48 --importance random "
        "--seq-length 8 --micro-batch-size 1",
        "new/.lock",
        "--save {new}",
    ),
    ("tools.convert", "import --hf {root}/hf --save {new}", "new/.lock", "--save {new}"),
    (
        "tools.convert",
        "layers --load {root}/model --save {new} --to hybrid",
        "new/.lock",
        "--save {new}",
    ),
    (
        "tools.convert",
        "export --load {root}/model --hf {new} --model-type llama",
        ".new.lock",
        "--hf {new}",
    ),
    (
        "tools.preprocess_data",
        "--input {root}/in.jsonl --output-prefix {new} --tokenizer-type NullTokenizer "
        "--vocab-size 9",
        ".new_text_document.lock",
        "--output-prefix {new}: {new}_text_document",
    ),
]


@pytest.mark.parametrize(("program", "line", "lock", "flag"), PUBLISHING)
def test_one_of_them_at_a_time_publishes(program, line, lock, flag, places, tmp_path):
    """Regression: the last rename held, or an empty folder was published."""
    new = tmp_path / "new"
    argv = line.format(root=places, new=new).split()
    take_lock(tmp_path / lock, "this test")
    code, message = fail(program, argv)
    assert code == RUNTIME, message
    assert f"{flag.format(new=new)} is in use by another run (host " in message
    assert f"pid {os.getpid()} " in message
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / lock]
    give_lock_back(tmp_path / lock)
    succeed(program, argv)
    assert not list(tmp_path.rglob("*.lock"))
    assert len(list(tmp_path.rglob("*"))) > 1


def test_a_lock_that_its_holder_removes_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """Between opening the file and locking it the other run may end, and a third one begin."""
    lock, lockf = tmp_path / LOCK, fcntl.lockf
    opened = []

    def late(file, how):
        if not opened:
            lock.unlink()
        opened.append(file)
        return lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    take_lock(lock, "--save")
    assert len(opened) == 2
    assert f"pid {os.getpid()} " in lock.read_text()
    give_lock_back(lock)
    assert not lock.exists()


# ---------------------------------------------------------------- streams


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return write


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("lost", [closed_pipe, full_disk])
def test_a_lost_stream_is_no_error(lost):
    with open(lost(), "w") as stream:
        lasting = _Lasting(stream)
        for _ in range(3):
            print("x" * 100_000, file=lasting, flush=True)
        assert lasting.fileno() == stream.fileno()


@pytest.mark.parametrize("streams", [("stdout",), ("stdout", "stderr")])
def test_a_run_outlives_its_reader(streams, tmp_path):
    """Regression: ``... | head -100`` ended a run unsaved."""
    save = tmp_path / "save"
    argv = [*RUN.split(), "--train-iters", "3", "--save", str(save), "--save-interval", "3"]
    lost = dict.fromkeys(streams, closed_pipe())
    ended = subprocess.run([sys.executable, "pretrain_distill.py", *argv], cwd=ROOT, **lost)
    assert ended.returncode == 0
    assert len(read_metrics(save)) == 3
    assert (save / "iter_0000003").exists()


# ---------------------------------------------------------------- shared memory


@pytest.mark.parametrize("size", ["4k", "64k"])
def test_shared_memory_that_is_full_is_named(size):
    """Regression: a traceback for its semaphores; a batch that found no space was waited for."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "
    if subprocess.run(["unshare", "-m", "sh", "-c", f"{mount}true"], check=False).returncode:
        pytest.skip("only root mounts")
    argv = [*RUN.split(), "--num-workers", "1", "--seq-length", "4096"]
    argv += ["--max-position-embeddings", "4096"]
    command = shlex.join([sys.executable, "pretrain_distill.py", *argv])
    ended = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount + command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == RUNTIME, ended.stderr
    said = ended.stderr.partition("Exception ignored in")[0]  # torch's, of a loader half built
    assert "Traceback" not in said.partition("ERROR: ")[2]
    assert "ERROR: a process that reads data has ended: /dev/shm is full" in ended.stderr


# ---------------------------------------------------------------- compiled code


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Return what builds the library of the losses in a cache of its own."""
    if compiled.library(losses_c.SOURCE) is None:
        pytest.skip("there is no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def build():
        return compiled.library.__wrapped__(losses_c.SOURCE)

    return build


def truncated(path):
    path.write_bytes(path.read_bytes()[:5000])


def emptied(path):
    path.write_bytes(b"")


def planted(path):
    source = path.with_suffix(".c")
    source.write_text("int planted = 1;")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)


def without_seal(path):
    path.with_name(f"{path.name}.sha256").unlink()


@pytest.mark.parametrize("damage", [truncated, emptied, planted, without_seal])
def test_a_library_that_is_not_as_it_was_built_is_built_again(damage, build, tmp_path):
    """Regression: a truncated one was a bus error at every start, an empty one the slow path."""
    found = run_ranks(1, look_for, str(tmp_path), damage)[0]
    assert found == (True, False, 0o700), found


def look_for(cache, damage):
    """Build, damage and load: whether the kernels and what was planted are there, the folder."""
    os.environ["XDG_CACHE_HOME"] = cache
    folder = Path(cache) / "megatron_ext"
    real, ctypes.CDLL = ctypes.CDLL, Path  # not loaded before it is damaged
    damage(compiled.library.__wrapped__(losses_c.SOURCE))
    ctypes.CDLL = real
    library = compiled.library.__wrapped__(losses_c.SOURCE)
    mode = folder.stat().st_mode & 0o777
    return hasattr(library, "row_stats_f32"), hasattr(library, "planted"), mode


def open_to_all(folder):
    folder.chmod(0o777)


def of_another_user(folder):
    os.chown(folder, 12345, -1)


@pytest.mark.parametrize("whose", [open_to_all, of_another_user])
def test_a_folder_that_others_write_is_not_trusted(whose, build, tmp_path, capsys):
    folder = tmp_path / "megatron_ext"
    folder.mkdir()
    try:
        whose(folder)
    except PermissionError:
        pytest.skip("only root gives files away")
    assert build() is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("NOTE: losses_cpu.c is not compiled, torch computes instead: ")
    assert str(folder) in line
    assert not list(folder.iterdir())


def test_no_compiler_is_said(build, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert build() is None
    assert "there is no C compiler" in capsys.readouterr().out


# ---------------------------------------------------------------- preprocessing


def preprocess_argv(folder, texts):
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [
        *("--input", str(path), "--output-prefix", str(folder / "out")),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", "9"),
    ]


@pytest.mark.parametrize("wanted", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_preprocessing_that_is_stopped_leaves_nothing(wanted, tmp_path):
    """Regression: its workers stayed for ever, and its unfinished files."""
    argv = [*preprocess_argv(tmp_path, ["1 2 3 " * 50 + "4"] * 40_000), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "tools/preprocess_data.py", *argv], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    this = psutil.Process(process.pid)
    try:
        wait_until(lambda: len(this.children()) == 2 and list(tmp_path.glob("*.bin.tmp-*")))
        workers = this.children()
        process.send_signal(wanted)
        assert process.wait(60) != 0
        wait_until(lambda: not any(map(psutil.Process.is_running, workers)), 20)
    finally:
        process.kill()
    if wanted != signal.SIGKILL:
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def on_a_full_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line(workers, tmp_path):
    argv = [*preprocess_argv(tmp_path, ["1 2 3 " * 50 + "4"] * 400), "--workers", str(workers)]
    code, message = fail("tools.preprocess_data", argv, 1, on_a_full_disk)
    assert code == DATA
    assert f"--output-prefix {tmp_path}/out: cannot write" in message
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_text_that_no_tokenizer_takes_is_named(tmp_path):
    """Regression: half of a surrogate pair was a TypeError without file and line."""
    argv = preprocess_argv(tmp_path, ["1 2", "bad \ud800 half", "3"])
    code, message = fail("tools.preprocess_data", argv)
    assert code == DATA
    assert f"{tmp_path}/in.jsonl:2: " in message
