"""Score files: round trip, and what is refused with which words."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from megatron_ext.pruning.scores import Scores, depth_method, lengths
from megatron_ext.pruning.scores_file import check_scores, load_scores, save_scores
from megatron_ext.runtime.errors import CHECKPOINT, UserError
from tests.models import LLAMA


def random_scores(arch, seed=0):
    """Return scores of every axis of ``arch``; other tests use it too."""
    generator = torch.Generator().manual_seed(seed)
    vectors = {name: torch.rand(n, generator=generator) for name, n in lengths(arch).items()}
    return Scores(
        vectors=vectors, source=arch, aggregation="batch=l2,seq=mean", samples=8, seq_length=16
    )


def test_round_trip(tmp_path):
    scores = replace(random_scores(LLAMA), depth="kl, rescored", removal_order=((3,), (1,)))
    save_scores(tmp_path / "folder" / "scores.safetensors", scores)
    loaded = load_scores(tmp_path / "folder" / "scores.safetensors")
    assert loaded.vectors.keys() == scores.vectors.keys()
    assert all(torch.equal(loaded.vectors[name], scores.vectors[name]) for name in scores.vectors)
    assert replace(loaded, vectors={}) == replace(scores, vectors={})
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["scores.safetensors"]
    check_scores(loaded, LLAMA)


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "scores.safetensors"
    save_scores(path, random_scores(LLAMA))
    before = path.read_bytes()
    broken = replace(random_scores(LLAMA, 1), aggregation=None)  # metadata must be text
    with pytest.raises(TypeError):
        save_scores(path, broken)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("content", [b"", b"not safetensors", None, "other"])
def test_unreadable_files_are_refused(tmp_path, content):
    path = tmp_path / "scores.safetensors"
    if content == "other":
        save_file({"hidden": torch.ones(3)}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"--scores .*scores\.safetensors cannot be read") as error:
        load_scores(path)
    assert error.value.code == CHECKPOINT


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "scores.safetensors"
    save_scores(path, random_scores(LLAMA))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="cannot be read"):
        load_scores(path)


@pytest.mark.parametrize(
    ("name", "vector", "message"),
    [
        ("ffn.2", None, "no vector 'ffn.2'"),
        ("heads.1", torch.ones(5), r"\[5\] as vector 'heads.1', expected torch.float32 \[4\]"),
        ("hidden", torch.ones(48, dtype=torch.float64), "torch.float64 .* as vector 'hidden'"),
        ("layers", torch.tensor([1, 2, float("nan"), 3]), "NaN or infinite .* 'layers'"),
        ("ffn.0", torch.full((80,), float("inf")), "NaN or infinite .* 'ffn.0'"),
    ],
)
def test_bad_vectors_are_named(name, vector, message):
    scores = random_scores(LLAMA)
    vectors = {k: v for k, v in {**scores.vectors, name: vector}.items() if v is not None}
    with pytest.raises(UserError, match=message):
        check_scores(replace(scores, vectors=vectors), LLAMA)


@pytest.mark.parametrize("order", [((1,), (1,)), ((4,),), ((0, 1), (2, 3))])
def test_removals_of_layers_that_are_not_there_are_refused(order):
    with pytest.raises(UserError, match=r"remove layers .* of 4"):
        check_scores(replace(random_scores(LLAMA), removal_order=order), LLAMA)


def test_methods_in_words():
    assert depth_method("block", 1, rescore=False) == "block"
    assert depth_method("kl", 2, rescore=True) == "kl, blocks of 2, rescored"


def test_scores_of_another_model_are_refused():
    with pytest.raises(UserError, match="hidden_size 48, this one has 64"):
        check_scores(random_scores(LLAMA), replace(LLAMA, hidden_size=64))
