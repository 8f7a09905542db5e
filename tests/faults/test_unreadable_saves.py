"""A --save that cannot be read, or holds no finished save, is never begun anew."""

import shutil
from pathlib import Path

import pytest

from megatron_ext.checkpoint import checkpoints
from megatron_ext.checkpoint.folder import find
from megatron_ext.runtime.errors import CHECKPOINT, UserError
from tests.models import LLAMA
from tests.programs import NEW_MODEL, fail, read_metrics, succeed, write_model

RUN = (
    f"{NEW_MODEL} --global-batch-size 1 --eval-iters 0 --num-workers 0 --log-interval 1 "
    "--save-interval 1"
)


def loop_of_links(path):
    """Put what nobody can read in place of ``path``, not root either."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.symlink_to(path.name)


def folder_in_place(path):
    path.unlink()
    path.mkdir()


def nothing(path):
    path.unlink()


def half_of_it(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# file under --save, what is done to it
UNREADABLE = [
    (".", loop_of_links),
    (checkpoints.TRACKER, loop_of_links),
    (checkpoints.TRACKER, folder_in_place),
    ("iter_0000001", loop_of_links),
    ("iter_0000001/metadata.json", loop_of_links),
    ("iter_0000001/metadata.json", folder_in_place),
    ("iter_0000001/.metadata", loop_of_links),
]
UNFINISHED = [
    ("iter_0000001/metadata.json", nothing),
    ("iter_0000001/metadata.json", half_of_it),
    ("iter_0000001/.metadata", nothing),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a --save with one iteration."""
    folder = tmp_path_factory.mktemp("saved") / "save"
    succeed("pretrain_distill", [*RUN.split(), "--save", str(folder)])
    return folder


def damaged(saved, tmp_path, name, damage):
    folder = Path(shutil.copytree(saved, tmp_path / "save"))
    damage(folder / name if name != "." else folder)
    return folder


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}


@pytest.mark.parametrize(("name", "damage"), UNREADABLE)
def test_what_cannot_be_read_is_not_what_is_not_there(name, damage, saved, tmp_path):
    """Regression: such a checkpoint counted as none."""
    folder = damaged(saved, tmp_path, name, damage)
    with pytest.raises(UserError, match="cannot be read") as error:
        find(str(folder))
    assert error.value.code == CHECKPOINT
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("name", "damage"), [UNREADABLE[1], UNREADABLE[3], UNREADABLE[4], *UNFINISHED]
)
def test_a_run_leaves_such_a_save_as_it_is(name, damage, saved, tmp_path):
    """Regression: it began at 0, replaced the checkpoints, emptied metrics.jsonl, ended with 0."""
    folder = damaged(saved, tmp_path, name, damage)
    before = contents(folder)
    argv = [*RUN.split(), "--save", str(folder)]
    code, message = fail("pretrain_distill", argv)
    assert code == CHECKPOINT
    assert str(folder) in message
    assert "\n" not in message
    assert fail("pretrain_distill", [*argv, "--load", str(folder)])[0] == CHECKPOINT
    assert contents(folder) == before


def test_metrics_of_an_earlier_run_are_kept(saved, tmp_path):
    folder = tmp_path / "save"
    folder.mkdir()
    shutil.copy(saved / "metrics.jsonl", folder)
    for number in (1, 2):
        (outcome,) = succeed("pretrain_distill", [*RUN.split(), "--save", str(folder)])
        assert f"metrics.{number}.jsonl" in outcome.stderr
        shutil.rmtree(folder / "iter_0000001")
        (folder / checkpoints.TRACKER).unlink()
    assert (folder / "metrics.1.jsonl").read_bytes() == (saved / "metrics.jsonl").read_bytes()
    assert read_metrics(folder) == read_metrics(saved)


def test_a_release_in_a_save_is_a_start(saved, tmp_path):
    """A run begins from the model that was pruned or converted into --save."""
    write_model(str(tmp_path), LLAMA)
    assert find(str(tmp_path)).name == checkpoints.RELEASE


def test_a_damaged_iteration_names_the_one_before(tmp_path):
    save = tmp_path / "save"
    argv = [*RUN.split(), "--train-iters", "2", "--save", str(save), "--load", str(save)]
    succeed("pretrain_distill", argv)
    shard = next((save / "iter_0000002").glob("*.distcp"))
    half_of_it(shard)
    code, message = fail("pretrain_distill", argv)
    assert code == CHECKPOINT
    assert f"{shard} is damaged" in message
    assert "--ckpt-step takes an older one, iter_0000001" in message
    succeed("pretrain_distill", [*argv, "--ckpt-step", "1"])
    assert [line["iteration"] for line in read_metrics(save)] == [1, 2]
