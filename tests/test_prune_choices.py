"""Every way to measure and to cut through prune.py, dense and with experts, serial and on ranks."""

from dataclasses import dataclass

import pytest
import torch

from megatron_ext.pruning.plan import load_plan
from megatron_ext.pruning.scores_file import load_scores
from tests.models import LLAMA, MOE
from tests.programs import (
    LAYOUTS,
    assert_same_bytes,
    data_flags,
    read_tensors,
    succeed,
    write_corpus,
    write_model,
)
from tests.test_prune import EP2, NO_DATA, target_flags

MODELS = {"dense": LLAMA, "experts": MOE}
LAYOUT = {"dense": LAYOUTS["TP2+SP"], "experts": EP2["EP2"]}
HALF = {"num_layers": 2, "hidden_size": 20, "num_attention_heads": 2}
WIDTHS = {"dense": {"ffn_hidden_size": 40}, "experts": {"moe_ffn_hidden_size": 10}}

# Flags, and what the plan says of them.
CHOICES = {
    "before the activation": ("--importance-neurons pre --importance-heads aggregate-first", {}),
    "var": ("--importance-batch var --importance-sequence var", {}),
    "packed documents": ("--reset-attention-mask --reset-position-ids", {}),
    "loss, rescored": (
        "--depth-importance loss --depth-rescore",
        {"depth": "loss, rescored"},
    ),
    "blocks by kl": ("--depth-importance kl --depth-block 2", {"depth": "kl, blocks of 2"}),
    "blocks, rescored": (
        "--depth-importance block --depth-block 2 --depth-rescore",
        {"depth": "block, blocks of 2, rescored"},
    ),
    "iterations": ("--prune-iterations 2", {"iterations": 2}),
    "paper": ("--head-residual paper", {}),
    "laco": ("--head-residual laco", {}),
    "magnitude": ("--importance magnitude", {"aggregation": "magnitude"}),
    "random": ("--importance random", {"aggregation": "random,seed=1234"}),
}
# What scores differently than the default; the others leave the width scores alone.
OTHER_SCORES = ("before the activation", "var", "packed documents", "magnitude", "random")


@dataclass(frozen=True)
class Source:
    load: str
    data: list[str]
    targets: list[str]
    scores: dict[str, torch.Tensor]
    """A run with the default choices."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    found = {}
    for name, arch in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        load, scores = str(folder / "model"), str(folder / "scores")
        write_model(load, arch)
        data = data_flags(arch, write_corpus(folder / "corpus", arch.vocab_size))
        data += ["--calibration-samples", "8"]
        succeed("prune", ["--load", load, *data, "--scores", scores])
        targets = target_flags({**HALF, **WIDTHS[name]})
        found[name] = Source(load, data, targets, load_scores(scores).vectors)
    return found


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", MODELS)
def test_every_choice_ends_in_the_same_model_on_ranks(name, choice, sources, tmp_path):
    source, (flags, made) = sources[name], CHOICES[choice]
    data = NO_DATA if choice in ("magnitude", "random") else source.data
    argv = ["--load", source.load, *data, *source.targets, *flags.split()]
    for place, (world_size, layout) in {"serial": (1, ""), "ranks": LAYOUT[name]}.items():
        files = [f"--{x}={tmp_path}/{place}/{x}" for x in ("scores", "plan", "save")]
        succeed("prune", [*argv, *files, *layout.split()], world_size)
    plans = [load_plan(tmp_path / place / "plan") for place in ("serial", "ranks")]
    assert plans[0] == plans[1]
    assert made.items() <= plans[0].made.items()
    expected = choice if choice in ("paper", "laco") else "none"
    assert plans[0].head_residual == expected
    tensors = [read_tensors(f"{tmp_path}/{place}/save") for place in ("serial", "ranks")]
    assert_same_bytes(*tensors)
    vectors = load_scores(tmp_path / "serial" / "scores").vectors
    width = [axis for axis in source.scores if axis != "layers"]
    same = [torch.equal(vectors[axis], source.scores[axis]) for axis in width]
    assert all(same) != (choice in OTHER_SCORES)
