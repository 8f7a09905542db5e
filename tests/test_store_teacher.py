"""A stored teacher: what is stored, training with it against a loaded teacher, what is refused."""

import json
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.inference import storing as store_run
from megatron_ext.runtime.errors import DATA, USAGE
from tests.models import LLAMA
from tests.programs import (
    LAYOUTS,
    assert_same_bytes,
    data_flags,
    fail,
    read_metrics,
    read_tensors,
    run_program,
    succeed,
    write_corpus,
    write_model,
)

STUDENT = replace(LLAMA, num_layers=2, hidden_size=32)
# SGD: Adam makes as much of the rounding of a gradient near 0 as of a gradient.
STEPS = "--train-iters 4 --global-batch-size 4"
TRAIN = (
    f"{STEPS} --lr 0.5 --optimizer sgd --log-interval 1 --save-interval 4 --eval-interval 4 "
    "--eval-iters 1"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    write_model(str(folder / "teacher"), LLAMA)
    write_model(str(folder / "student"), STUDENT)
    write_corpus(folder / "corpus", LLAMA.vocab_size)
    write_corpus(folder / "other", LLAMA.vocab_size)
    store(storing(folder, "store"))
    return folder


def few_in_a_file():
    store_run.SAMPLES_PER_FILE = 6


def store(argv, ranks=1):
    outcomes = run_program("tools.store_teacher", argv, ranks, before=few_in_a_file)
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr


def storing(root, name, corpus="corpus", flags="--kd-top-k 7"):
    where = ["--teacher-load", str(root / "teacher"), "--kd-teacher-store", str(root / name)]
    return [*where, *data_flags(LLAMA, str(root / corpus)), *shlex.split(f"{STEPS} {flags}")]


def training(root, save, flags, corpus="corpus"):
    where = ["--load", str(root / "student"), "--save", str(save)]
    return [*where, *data_flags(LLAMA, str(root / corpus)), *shlex.split(f"{TRAIN} {flags}")]


def files(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("layout", ["TP2", "TP2+SP", "PP2", "PP2xVPP2", "TP2xPP2", "DP2", "CP2"])
def test_every_layout_stores_the_same(root, tmp_path, layout):
    ranks, flags = LAYOUTS[layout]
    argv = storing(root, "store", flags=f"--kd-top-k 7 {flags}")
    argv[argv.index("--kd-teacher-store") + 1] = str(tmp_path / "store")
    store(argv, ranks)
    found, expected = files(tmp_path / "store"), files(root / "store")
    assert found.keys() == expected.keys()
    assert len(found) == 3
    for name, tensors in expected.items():
        assert torch.equal(found[name]["digests"], tensors["digests"])
        assert torch.equal(found[name]["tokens"], tensors["tokens"])
        torch.testing.assert_close(found[name]["log_probs"], tensors["log_probs"])


@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        ("TP1", "--kd-top-k 7 --kd-lm-loss-weight 0.5"),
        ("TP2", "--kd-top-k 5 --kd-top-k-rest tail"),
        ("PP2", "--kd-top-k 7 --kd-loss-weight 2"),
        ("CP2", "--kd-top-k 7 --kd-top-k-rest tail"),
        ("DP2", "--kd-top-k 4 --kd-temperature-squared"),
    ],
)
def test_training_is_the_same_as_beside_the_teacher(root, tmp_path, layout, flags):
    ranks, parallel = LAYOUTS[layout]
    for name, teacher in (
        ("stored", f"--kd-teacher-store {root / 'store'}"),
        ("loaded", f"--teacher-load {root / 'teacher'}"),
    ):
        argv = training(root, tmp_path / name, f"{teacher} {flags} {parallel}")
        succeed("pretrain_distill", argv, ranks)
    metrics, expected = (read_metrics(str(tmp_path / name)) for name in ("stored", "loaded"))
    for stored, loaded in zip(metrics, expected, strict=True):
        common = {key for key in stored.keys() & loaded.keys() if "loss" in key}
        assert any(key.startswith(("kd loss", "lm loss")) for key in common)
        for key in common:
            assert stored[key] == pytest.approx(loaded[key], rel=1e-5), key
    assert sum("kd loss" in stored for stored in metrics) == 4
    found, expected = (read_tensors(str(tmp_path / name)) for name in ("stored", "loaded"))
    weights = [key for key in found if not key.startswith("optimizer")]
    for key in weights:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)


def test_an_interrupted_store_goes_on(root, tmp_path):
    shutil.copytree(root / "store", tmp_path / "store")
    name = list(files(root / "store"))[1]
    (tmp_path / "store" / name).unlink()
    argv = training(root, tmp_path / "save", f"--kd-teacher-store {tmp_path / 'store'}")
    code, line = fail("pretrain_distill", argv, 2)
    assert (code, "is missing: run tools/store_teacher.py again" in line) == (DATA, True)
    argv = storing(root, "store")
    argv[argv.index("--kd-teacher-store") + 1] = str(tmp_path / "store")
    store(argv)
    assert_same_bytes(*(files(folder / "store")[name] for folder in (tmp_path, root)))
    before = (tmp_path / "store" / name).stat().st_mtime_ns
    store(argv)
    assert (tmp_path / "store" / name).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "corpus", "message"),
    [
        ("--seed 7", "corpus", "sample 0 is not the one that was stored"),
        ("--split 70,20,10", "corpus", "is not the one that was stored"),
        ("--train-iters 5", "corpus", "has 16 samples, the run needs 20"),
        ("--kd-top-k 8", "corpus", "--kd-top-k 8: the stored teacher has the 7 likeliest"),
        ("--kd-temperature 2", "corpus", "the stored teacher has temperature 1.0, this run 2.0"),
        ("--seq-length 8", "corpus", "the stored teacher has seq_length 16, this run 8"),
        ("--teacher-load x", "corpus", "--teacher-load does not go with --kd-teacher-store"),
        ("--kd-loss mse", "corpus", "--kd-teacher-store needs --kd-loss forward-kl"),
    ],
)
def test_another_run_than_what_was_stored_is_refused(root, tmp_path, flags, corpus, message):
    argv = training(root, tmp_path / "save", f"--kd-teacher-store {root / 'store'} {flags}", corpus)
    code, line = fail("pretrain_distill", argv)
    assert message in line
    assert code in (DATA, USAGE)
    assert not (tmp_path / "save" / "latest_checkpointed_iteration.txt").exists()


def test_another_store_is_not_written_over(root):
    argv = storing(root, "store", flags="--kd-top-k 5")
    code, line = fail("tools.store_teacher", argv, before=few_in_a_file)
    assert code == DATA
    assert "holds a store with top_k 7, not 5" in line
    code, line = fail("tools.store_teacher", storing(root, "new", flags="--kd-top-k 101"))
    assert "--kd-top-k 101: the vocabulary has 100 tokens" in line
    assert not (root / "new").exists()
    assert json.loads((root / "store/index.json").read_text())["top_k"] == 7
