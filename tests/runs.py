"""Both programs from one source under any layout, and what must not depend on the layout.

source = write_source(folder, LLAMA)
files = prune(folder, source, "--target-hidden-size 40", LAYOUTS["TP2"])
assert_same_run(files, prune(other, source, "--target-hidden-size 40"))
"""

import shlex
from pathlib import Path

import pytest
import torch

from megatron_ext.arch import Arch
from megatron_ext.pruning.plan import load_plan
from megatron_ext.pruning.scores_file import load_scores
from tests.programs import (
    assert_same_bytes,
    data_flags,
    read_metrics,
    read_tensors,
    succeed,
    write_corpus,
    write_model,
)

TRAIN = shlex.split(
    "--train-iters 4 --global-batch-size 4 --lr 1e-3 --lr-decay-style constant --save-interval 2 "
    "--log-interval 1"
)


def write_source(folder: Path, arch: Arch) -> dict:
    """Write a model and a corpus; return its folder (load) and the flags of its data (data)."""
    corpus = write_corpus(folder / "corpus", arch.vocab_size)
    source = {"load": str(folder / "model"), "data": data_flags(arch, corpus)}
    write_model(source["load"], arch)
    return source


def prune(folder, source, targets, layout=(1, ""), **more):
    """Run prune.py and return the names of what it writes."""
    files = {name: str(folder / name) for name in ("scores", "plan", "save")} | more
    words = [word for name, path in files.items() for word in (f"--{name}", path)]
    argv = ["--load", source["load"], *source["data"], "--calibration-samples", "8"]
    succeed("prune", [*argv, *targets.split(), *layout[1].split(), *words], layout[0])
    return files


def assert_same_run(ours, theirs):
    """Compare what ``prune`` named: scores up to rounding, the plan and the weights exactly."""
    one, other = (load_scores(files["scores"]) for files in (ours, theirs))
    assert one.vectors.keys() == other.vectors.keys()
    assert (one.depth, one.source) == (other.depth, other.source)
    for name, vector in other.vectors.items():
        tolerance = 1e-7 * vector.max().item()
        torch.testing.assert_close(one.vectors[name], vector, rtol=1e-5, atol=tolerance)
    assert load_plan(ours["plan"]) == load_plan(theirs["plan"])
    assert_same_bytes(read_tensors(ours["save"]), read_tensors(theirs["save"]))


def train(source, save, *words, layout=(1, "")):
    """Train and return the losses and gradient norms that were logged."""
    argv = ["--save", str(save), *source["data"], *TRAIN, *words, *layout[1].split()]
    succeed("pretrain_distill", argv, layout[0])
    return {line["iteration"]: line for line in read_metrics(save)}


def assert_same_curve(ours, theirs):
    """Compare the losses and gradient norms that ``train`` returned, up to rounding."""
    assert ours.keys() == theirs.keys()
    for iteration, line in theirs.items():
        names = [name for name in line if name.endswith("loss") or name == "grad-norm"]
        assert "grad-norm" in names
        expected = [line[name] for name in names]
        assert [ours[iteration][name] for name in names] == pytest.approx(expected, rel=2e-5)
