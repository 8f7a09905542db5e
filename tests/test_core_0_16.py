"""Checkpoints of megatron-core 0.16.1 are read as they were, and training goes on from them."""

import json
import tarfile
from pathlib import Path

import pytest

from megatron_ext.checkpoint import checkpoints
from tests.core_0_16 import make
from tests.ranks import run_ranks

FOLDER = Path(make.__file__).parent
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def unpack(name, tmp_path):
    with tarfile.open(FOLDER / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return str(tmp_path / name)


@pytest.mark.parametrize("name", EXPECTED)
def test_args_tensors_and_logits_are_those_of_the_writer(name, tmp_path):
    folder, expected = unpack(name, tmp_path), EXPECTED[name]
    assert (checkpoints.read(folder).folder / "common.pt").exists()
    found = make.what_is_read(folder)
    assert found["args"] == expected["args"]
    assert found["tensors"] == expected["tensors"]
    assert found["logits"] == pytest.approx(expected["logits"], rel=1e-12)


@pytest.mark.parametrize("name", make.TRAINED)
def test_training_goes_on_with_the_writers_losses(name, tmp_path):
    arch, world_size, flags = make.TRAINED[name]
    steps = run_ranks(world_size, make.go_on, arch, unpack(name, tmp_path), flags)[0]
    for step, expected in zip(steps, EXPECTED[name]["steps"], strict=True):
        assert step == pytest.approx(expected, rel=1e-6)
