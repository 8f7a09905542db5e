"""Mamba pruned: heads within their groups, channels of all heads, and what stands beside them."""

import shlex
from dataclasses import replace

import pytest
import torch

from megatron_ext.arch import num_parameters
from megatron_ext.checkpoint import checkpoints
from megatron_ext.model import mamba
from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.pruning.importance import Importance
from megatron_ext.pruning.iterate import iteration_targets
from megatron_ext.pruning.plan import load_plan
from megatron_ext.pruning.planner import make_plan
from megatron_ext.pruning.scores import Scores, lengths
from megatron_ext.pruning.scores_file import load_scores
from megatron_ext.pruning.targets import target_arch
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import USAGE, UserError
from tests.models import random_batch
from tests.programs import (
    LAYOUTS,
    assert_same_bytes,
    fail,
    logits_of,
    read_model,
    read_tensors,
)
from tests.ranks import run_ranks
from tests.runs import TRAIN, assert_same_curve, assert_same_run, prune, train, write_source
from tests.test_mamba import HYBRID
from tests.test_scores import random_scores

HEADS, CHANNELS, GROUPS = 12, 6, 4
WIDTHS = "--target-mamba-num-heads 8 --target-mamba-head-dim 4"
SMALLER = f"{WIDTHS} --target-mamba-layers 2 --target-mlp-layers 1 --target-hidden-size 40"
FEWER_GROUPS = "--target-mamba-num-groups 2"
UNEVEN = (2, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ett|ttttL")


# Permutations.


def reordered(model, heads, channels):
    """Put the heads of each mixer, and the channels of each head, into another order."""
    inner = [head * CHANNELS + channel for head in heads for channel in channels]
    size = HEADS * CHANNELS
    for layer in model.decoder.layers:
        if not hasattr(layer, "mixer"):
            continue
        mixer = layer.mixer
        rows = torch.arange(len(mixer.in_proj.weight))
        rows[:size], rows[size : 2 * size] = rows[inner], rows[size : 2 * size][inner]
        rows[-HEADS:] = rows[-HEADS:][heads]
        x = torch.arange(len(mixer.conv1d_bias))
        x[:size] = x[inner]
        orders = {
            mixer.in_proj.weight: rows,
            **dict.fromkeys((mixer.conv1d_weight, mixer.conv1d_bias), x),
            **dict.fromkeys((mixer.A_log, mixer.D, mixer.dt_bias), heads),
            mixer.norm.weight: inner,
        }
        for parameter, order in orders.items():
            parameter.data = parameter.data[order]
        mixer.out_proj.weight.data = mixer.out_proj.weight.data[:, inner]


def logits_in_order(heads, channels):
    """Return logits before and after units have changed places."""
    groups = platform.initialize().groups
    (model,) = build_model(HYBRID, ModelOptions(params_dtype=torch.float64), groups, seed=7)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    before = logits_of(model, HYBRID)
    reordered(model, heads, channels)
    return before, logits_of(model, HYBRID)


@pytest.mark.parametrize(
    ("heads", "channels", "same"),
    [
        ([2, 0, 1, 3, 5, 4, 6, 7, 8, 11, 10, 9], [*range(CHANNELS)], True),
        ([*range(HEADS)], [5, 0, 3, 1, 2, 4], True),
        ([3, 1, 2, 0, *range(4, HEADS)], [*range(CHANNELS)], False),
    ],
    ids=["heads within groups", "channels of all heads", "heads of two groups"],
)
def test_heads_change_places_within_their_group(heads, channels, same):
    ((before, after),) = run_ranks(1, logits_in_order, heads, channels)
    difference = (before - after).abs().max()
    assert difference < 1e-12 if same else difference > 1e-2


# Scores and plans.


def naive_scores(folder, samples):
    """Return L2 over samples of the mean over positions of |x|, [layers, heads, channels]."""
    model, found = read_model(folder), []
    mixers = [layer.mixer for layer in model.decoder.layers if hasattr(layer, "mixer")]
    seen = [[] for _ in mixers]
    for mixer, kept in zip(mixers, seen, strict=True):
        mixer.in_proj.register_forward_hook(lambda _, args, out, kept=kept: kept.append(out[0]))
    for sample in samples:
        with torch.no_grad():
            model(sample, torch.arange(sample.size(1)).unsqueeze(0), None)
    size = HEADS * CHANNELS
    for kept in seen:
        means = [x[:, 0, size : 2 * size].abs().mean(0) for x in kept]
        found.append(torch.stack(means).norm(dim=0).view(HEADS, CHANNELS))
    return torch.stack(found)


def calibrated(folder, samples):
    model = read_model(folder)
    importance = Importance([model], HYBRID, model.pg_collection, sequence_parallel=False)
    with importance.attached(), torch.no_grad():
        for sample in samples:
            importance.expect(torch.ones(sample.shape))
            model(sample, torch.arange(sample.size(1)).unsqueeze(0), None)
    return importance.collect()


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("hybrid"), HYBRID)


def test_scores_are_those_of_the_paper(hybrid):
    samples = random_batch(HYBRID, num_samples=3, seq_length=16)["tokens"].unsqueeze(1)
    (expected,) = run_ranks(1, naive_scores, hybrid["load"], samples)
    (found,) = run_ranks(1, calibrated, hybrid["load"], samples)
    assert found.keys() == lengths(HYBRID).keys()
    for layer, scores in enumerate(expected):
        ours = found[f"mamba_heads.{layer}"].view(HEADS, CHANNELS)
        torch.testing.assert_close(ours.double(), scores, rtol=1e-5, atol=0)
        channels = found[f"mamba_channels.{layer}"].double()
        torch.testing.assert_close(channels, scores.norm(dim=0), rtol=1e-5, atol=0)


def test_heads_are_ranked_by_the_channels_that_stay():
    arch = replace(
        HYBRID, mamba_num_heads=4, mamba_num_groups=2, mamba_head_dim=3, num_layers=1,
        hybrid_layer_pattern="M",
    )  # fmt: skip
    scores = torch.tensor([[1.0, 1, 9], [2, 2, 0], [3, 0, 0], [2, 2, 0]])
    vectors = {"mamba_heads.0": scores.flatten(), "mamba_channels.0": torch.tensor([8.0, 7, 6])}
    made = Scores(vectors=vectors, source=arch, aggregation="", samples=1, seq_length=1)
    plan = make_plan(made, arch, target_arch(arch, mamba_num_heads=2))
    assert plan.kept["mamba_heads.0"] == (0, 2)
    plan = make_plan(made, arch, target_arch(arch, mamba_num_heads=2, mamba_head_dim=2))
    assert plan.kept["mamba_channels.0"] == (0, 1)
    assert plan.kept["mamba_heads.0"] == (1, 2)  # of group 0 and of group 1; channel 2 is gone


def test_targets_keep_as_many_heads_of_each_group():
    assert target_arch(HYBRID, mamba_num_groups=2).mamba_num_heads == 6
    with pytest.raises(UserError, match="--target-mamba-num-heads 9: each of 4 mamba groups"):
        target_arch(HYBRID, mamba_num_heads=9)
    with pytest.raises(UserError, match="each of 2 mamba groups keeps the same number of its 3"):
        target_arch(HYBRID, mamba_num_heads=8, mamba_num_groups=2)
    half = target_arch(HYBRID, mamba_num_heads=4, mamba_head_dim=2)
    assert [x.mamba_num_heads for x in iteration_targets(HYBRID, half, 2)] == [8, 4]
    plan = make_plan(
        Scores(
            vectors=random_scores(HYBRID).vectors, source=HYBRID, aggregation="", samples=1,
            seq_length=1,
        ),
        HYBRID, target_arch(HYBRID, mamba_layers=1),
    )  # fmt: skip
    assert plan.target.pattern.count("M") == 1
    assert replace(HYBRID).with_sublayers("*-").mamba_num_heads is None


# prune.py.


@pytest.fixture(scope="module")
def smaller(hybrid, tmp_path_factory):
    return prune(tmp_path_factory.mktemp("smaller"), hybrid, SMALLER)


@pytest.mark.parametrize("layout", ["TP2+SP", "PP2", "DP2", "CP2"])
def test_no_layout_changes_scores_plan_or_bytes(layout, hybrid, smaller, tmp_path):
    layout = UNEVEN if layout == "PP2" else LAYOUTS[layout]
    assert_same_run(prune(tmp_path, hybrid, SMALLER, layout), smaller)
    arch = checkpoints.read(smaller["save"]).arch
    assert (arch.mamba_num_heads, arch.mamba_head_dim, arch.mamba_num_groups) == (8, 4, 4)
    assert num_parameters(arch) == sum(x.numel() for x in read_tensors(smaller["save"]).values())


def masked_logits(folder, plan):
    """Return logits of the source whose cut units are zero behind their gates.

    The norm behind divides by as many channels as the pruned model's, which are all there are.
    """
    model, arch = read_model(folder), plan.source
    share = 1.0
    for name in ("mamba_num_heads", "mamba_head_dim"):
        share *= getattr(plan.target, name) / getattr(arch, name)
    share *= arch.mamba_num_groups / plan.target.mamba_num_groups
    mamba.EPSILON *= share
    mixers = [layer.mixer for layer in model.decoder.layers if hasattr(layer, "mixer")]
    for layer, mixer in enumerate(mixers):
        stays = torch.zeros(HEADS, CHANNELS, dtype=torch.bool)
        heads = torch.tensor(plan.kept[f"mamba_heads.{layer}"])
        stays[heads.unsqueeze(1), torch.tensor(plan.kept[f"mamba_channels.{layer}"])] = True
        mixer.in_proj.weight.data[: HEADS * CHANNELS][~stays.flatten()] = 0  # z: silu(0) is 0
        mixer.norm.weight.data *= share**0.5
    return logits_of(model, arch)


def logits_on_disk(folder, arch):
    return logits_of(read_model(folder), arch)


@pytest.mark.parametrize("targets", [WIDTHS, FEWER_GROUPS])
def test_masked_is_trimmed(targets, hybrid, tmp_path):
    files = prune(tmp_path, hybrid, targets)
    plan = load_plan(files["plan"])
    (trimmed,) = run_ranks(1, logits_on_disk, files["save"], plan.target)
    (whole,) = run_ranks(1, logits_on_disk, hybrid["load"], plan.source)
    (masked,) = run_ranks(1, masked_logits, hybrid["load"], plan)
    torch.testing.assert_close(trimmed, masked, rtol=1e-11, atol=1e-11)
    assert (trimmed - whole).abs().max() > 0.1


def test_pruning_to_the_same_sizes_returns_the_same_bytes(hybrid, tmp_path):
    same = prune(tmp_path, hybrid, "", LAYOUTS["TP2"])
    assert_same_bytes(read_tensors(same["save"]), read_tensors(hybrid["load"]))
    assert checkpoints.read(same["save"]).arch == HYBRID


@pytest.mark.parametrize("how", ["magnitude", "random"])
def test_other_scores(how, hybrid, tmp_path):
    files = prune(tmp_path, hybrid, f"{WIDTHS} --importance {how}")
    vectors = load_scores(files["scores"]).vectors
    assert vectors.keys() == lengths(HYBRID).keys()
    if how == "magnitude":
        heads, channels = (vectors[f"mamba_{name}.1"].double() for name in ("heads", "channels"))
        tensors = read_tensors(hybrid["load"])
        mine = {k: x for k, x in tensors.items() if k.startswith("decoder.layers.2.mixer.")}
        norm = {key.partition("mixer.")[2]: x.double() for key, x in mine.items()}
        rows = sum(norm[f"in_proj.weight.{part}"].square().sum(1) for part in "zx")
        rows += norm["out_proj.weight"].square().sum(0) + norm["norm.weight"].square()
        rows += norm["conv1d.weight.x"].square().sum((1, 2)) + norm["conv1d.bias.x"].square()
        rows = rows.view(HEADS, CHANNELS)
        torch.testing.assert_close(channels.square(), rows.sum(0), rtol=1e-5, atol=0)
        alone = norm["in_proj.weight.dt"].square().sum(1)
        alone += sum(norm[name].square() for name in ("A_log", "D", "dt_bias"))
        found = heads.view(HEADS, CHANNELS).square()
        torch.testing.assert_close(found, rows + alone.unsqueeze(1) / CHANNELS, rtol=1e-5, atol=0)


@pytest.mark.parametrize("way", ["--depth-importance kl", "--prune-iterations 2"])
def test_no_layout_changes_other_ways(way, hybrid, tmp_path):
    argv = f"--target-mamba-layers 2 {WIDTHS} {way}"
    one, two = (prune(tmp_path / x, hybrid, argv, LAYOUTS[x]) for x in ("TP1", "TP2+SP"))
    assert_same_run(two, one)


# Training.


@pytest.fixture(scope="module")
def distilled(hybrid, smaller, tmp_path_factory):
    words = ["--load", smaller["save"], "--teacher-load", hybrid["load"]]
    return words, train(hybrid, tmp_path_factory.mktemp("run") / "one", *words)


@pytest.mark.parametrize("layout", ["TP2+SP", "CP2"])
def test_distillation_is_the_same_under_every_layout(layout, distilled, hybrid, tmp_path):
    words, expected = distilled
    found = train(hybrid, tmp_path / "run", *words, layout=LAYOUTS[layout])
    assert_same_curve(found, expected)
    assert any("kd" in name for name in found[1])


def test_a_run_is_resumed_under_another_layout(distilled, hybrid, tmp_path):
    words, expected = distilled
    run = tmp_path / "run"
    train(hybrid, run, *words, "--train-iters", "2", layout=LAYOUTS["TP2"])
    resume = ["--load", str(run), *words[2:], "--override-opt-param-scheduler"]
    assert_same_curve(train(hybrid, run, *resume, layout=LAYOUTS["DP2"]), expected)


def test_layouts_that_cannot_be(hybrid, tmp_path):
    argv = ["--load", hybrid["load"], *hybrid["data"], *TRAIN, "--save", str(tmp_path / "x")]
    flags = shlex.split("--context-parallel-size 8 --world-size 8 --dry-run --seq-length 16")
    code, line = fail("pretrain_distill", [*argv, *flags])
    assert code == USAGE
    assert "--context-parallel-size 8 does not divide the 12 Mamba heads" in line
    for program, more in (("pretrain_distill", []), ("prune", ["--calibration-samples", "8"])):
        words = [*argv[: argv.index(TRAIN[0])], "--save", str(tmp_path / "x")]
        training = TRAIN if program == "pretrain_distill" else []
        code, line = fail(program, [*words, *training, *more, "--reset-attention-mask"])
        assert code == USAGE
        assert "no mask stops the states of Mamba" in line
