"""Pruning in steps: their sizes, several plans as one, and prune.py scoring in between."""

import itertools
from argparse import Namespace
from dataclasses import replace
from functools import reduce

import pytest
import torch

from megatron_ext.arch import weights
from megatron_ext.checkpoint import checkpoints, writer
from megatron_ext.checkpoint.slices import SliceReader
from megatron_ext.model.build import build_model, model_state_dict
from megatron_ext.model.config import ModelOptions
from megatron_ext.pruning.iterate import compose, iteration_targets
from megatron_ext.pruning.plan import contradiction, load_plan
from megatron_ext.pruning.planner import make_plan
from megatron_ext.pruning.scores_file import load_scores, save_scores
from megatron_ext.pruning.targets import target_arch
from megatron_ext.pruning.trim import fill_trimmed, trimmed_share
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import USAGE
from tests.models import GPT2, LLAMA, MOE, NEMOTRON
from tests.programs import (
    LAYOUTS,
    assert_same_bytes,
    data_flags,
    fail,
    read_tensors,
    succeed,
    write_corpus,
    write_model,
)
from tests.ranks import run_ranks
from tests.test_depth import LAYOUTS as MODEL_LAYOUTS
from tests.test_plan import with_vectors
from tests.test_prune import target_flags
from tests.test_residual import FakeReader
from tests.test_scores import random_scores

# 4 query groups of 4 heads: steps on which heads go faster than groups, and the other way round.
GROUPS = replace(NEMOTRON, num_attention_heads=16, num_query_groups=4)
NEMOTRON_15B = replace(
    NEMOTRON,
    num_layers=32,
    hidden_size=6144,
    ffn_hidden_size=24576,
    num_attention_heads=48,
    num_query_groups=8,
    kv_channels=128,
)


def sizes(archs, name):
    return [getattr(arch, name) for arch in archs]


# Sizes.


def test_widths_go_in_equal_steps_and_layers_at_the_end():
    target = target_arch(
        NEMOTRON_15B,
        num_layers=29,
        hidden_size=4096,
        ffn_hidden_size=9216,
        num_attention_heads=24,
    )
    steps = iteration_targets(NEMOTRON_15B, target, 4)
    assert sizes(steps, "hidden_size") == [5632, 5120, 4608, 4096]  # paper, table 12
    assert sizes(steps, "ffn_hidden_size") == [20736, 16896, 13056, 9216]
    assert sizes(steps, "num_attention_heads") == [48, 40, 32, 24]  # 42 and 36 are no multiples
    assert sizes(steps, "num_query_groups") == [8, 8, 8, 8]
    assert sizes(steps, "num_layers") == [32, 32, 32, 29]
    assert steps[-1] == target


def test_keys_and_values_go_with_heads_that_have_their_own():
    many = replace(GPT2, num_attention_heads=12, num_query_groups=12)
    steps = iteration_targets(many, target_arch(many, num_attention_heads=4), 2)
    assert sizes(steps, "num_attention_heads") == sizes(steps, "num_query_groups") == [8, 4]


WIDTHS = [
    (NEMOTRON, {"hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2}),
    (NEMOTRON_15B, {"num_query_groups": 2, "num_attention_heads": 6, "hidden_size": 64}),
    (GROUPS, {"num_query_groups": 2, "num_attention_heads": 4}),
    (
        MOE,
        {
            "num_query_groups": 1,
            "num_experts": 2,
            "moe_ffn_hidden_size": 5,
            "moe_shared_expert_intermediate_size": 3,
        },
    ),
]


@pytest.mark.parametrize("iterations", [1, 2, 3, 7])
@pytest.mark.parametrize(("arch", "widths"), WIDTHS)
def test_every_step_is_a_pruned_form_of_the_one_before(arch, widths, iterations):
    arch = replace(arch, num_layers=2)
    target = target_arch(arch, **widths)
    steps = [arch, *iteration_targets(arch, target, iterations)]
    assert steps[-1] == target
    assert len(steps) == len(set(steps)) <= iterations + 1
    plans = [
        make_plan(random_scores(source), source, step) for source, step in itertools.pairwise(steps)
    ]
    assert all(contradiction(plan) is None for plan in plans)
    whole = reduce(compose, plans)
    assert contradiction(whole) is None
    assert (whole.source, whole.target) == (arch, target)


def test_one_iteration_and_no_change_are_one_step():
    target = target_arch(LLAMA, hidden_size=40, num_layers=3)
    assert iteration_targets(LLAMA, target, 1) == [target]
    assert iteration_targets(LLAMA, LLAMA, 3) == [LLAMA]
    assert iteration_targets(LLAMA, target_arch(LLAMA, num_layers=3), 3) == [
        target_arch(LLAMA, num_layers=3)
    ]


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_a_layout_that_fits_both_ends_fits_every_step(tp):
    target = target_arch(NEMOTRON_15B, ffn_hidden_size=9216, num_attention_heads=24)
    for step in iteration_targets(NEMOTRON_15B, target, 5):
        assert step.ffn_hidden_size % tp == step.num_attention_heads % tp == 0


# Plans.

STEPS = (
    {"hidden_size": 28, "ffn_hidden_size": 48, "num_layers": 3},
    {"hidden_size": 22, "ffn_hidden_size": 31, "num_layers": 2},
)
HEADS = {"llama": (4, 2), "gpt2": (3, 2), "nemotron": (6, 4)}
MODELS = {"llama": LLAMA, "gpt2": GPT2, "nemotron": NEMOTRON}


def chain_of_plans(name):
    arch, plans = MODELS[name], []
    for number, (changes, heads) in enumerate(zip(STEPS, HEADS[name], strict=True)):
        target = target_arch(arch, **changes, num_attention_heads=heads)
        plans.append(make_plan(random_scores(arch, number), arch, target))
        arch = target
    return plans


class TrimmedReader(FakeReader):
    """Tensors that trimming wrote, read by another reader."""

    def __init__(self, share, arch):
        super().__init__(arch)
        for weight in weights(arch):
            parts = {s.global_offset: s.data for s in share.values() if s.key == weight.key}
            parts = [parts[offset] for offset in sorted(parts)]
            self.tensors[weight.key] = torch.stack(parts) if weight.per_layer else parts[0]


@pytest.mark.parametrize("name", MODELS)
def test_one_cut_by_the_composed_plan_gives_the_bytes_of_a_chain_of_cuts(name):
    arch, (first, second) = MODELS[name], chain_of_plans(name)
    plan = compose(first, second)
    assert contradiction(plan) is None
    assert (plan.source, plan.target) == (arch, second.target)
    assert plan.made["iterations"] == 2
    source = FakeReader(arch)
    between = TrimmedReader(trimmed_share(source, first, 0, 1), first.target)
    chained = TrimmedReader(trimmed_share(between, second, 0, 1), second.target)
    at_once = TrimmedReader(trimmed_share(source, plan, 0, 1), plan.target)
    assert_same_bytes(at_once.tensors, chained.tensors)


def test_composing_with_a_plan_that_keeps_everything_changes_nothing():
    plan, _ = chain_of_plans("nemotron")
    same = make_plan(None, plan.target, plan.target)
    whole = make_plan(None, NEMOTRON, NEMOTRON)
    assert replace(compose(plan, same), made=plan.made) == plan
    assert replace(compose(whole, plan), made=plan.made) == plan
    with pytest.raises(AssertionError, match="another model"):
        compose(same, plan)


# Models in between.


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_model(str(folder / "model"), LLAMA)
    corpus = data_flags(LLAMA, write_corpus(folder / "corpus", LLAMA.vocab_size))
    return str(folder / "model"), [*corpus, "--calibration-samples", "8"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("gpt2"))
    write_model(folder, GPT2)
    return folder


def save_filled(load, save, plan, layout, options):
    groups = platform.initialize(**layout).groups
    chunks = build_model(plan.target, ModelOptions(**options), groups)
    state = model_state_dict(chunks)
    fill_trimmed(state, SliceReader(checkpoints.read(load).folder), plan)
    args = Namespace(**plan.target.to_args())
    writer.save(save, "release", model_state_dict(chunks) | {"args": args}, files={})


@pytest.mark.parametrize("layout", ["serial", "TP2+SP", "PP2"])
def test_a_model_in_between_has_the_weights_of_a_trimmed_checkpoint(layout, source, tmp_path):
    world_size, sizes, options = MODEL_LAYOUTS[layout]
    target = target_arch(LLAMA, hidden_size=40, ffn_hidden_size=48, num_layers=2)
    plan = make_plan(random_scores(LLAMA), LLAMA, target)
    save = str(tmp_path / "filled")
    run_ranks(world_size, save_filled, source[0], save, plan, sizes, options)
    reader = SliceReader(checkpoints.read(source[0]).folder)
    expected = TrimmedReader(trimmed_share(reader, plan, 0, 1), target).tensors
    assert_same_bytes(read_tensors(save), expected)


# prune.py.


def prune(source, save, *flags, layout="TP1", load=None):
    world_size, parallel = LAYOUTS[layout]
    argv = ["--load", load or source[0], *source[1], "--save", str(save), *parallel.split()]
    succeed("prune", [*argv, *map(str, flags)], world_size)
    return load_plan(checkpoints.read(str(save)).folder / "plan.json")


WIDTHS = {"hidden_size": 16, "ffn_hidden_size": 48, "num_attention_heads": 2}
BETWEEN = {"hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}


def test_two_iterations_are_two_runs_one_after_the_other(source, tmp_path):
    two, first, second = (tmp_path / name for name in ("two", "first", "second"))
    plan = prune(source, two, *target_flags(WIDTHS), "--prune-iterations", 2)
    assert plan.made["iterations"] == 2
    prune(source, first, *target_flags(BETWEEN))
    prune(source, second, *target_flags(WIDTHS), load=str(first))
    assert_same_bytes(read_tensors(str(two)), read_tensors(str(second)))
    at_once = prune(source, tmp_path / "one", *target_flags(WIDTHS))
    assert at_once.kept["hidden"] != plan.kept["hidden"], "scores in between made no difference"


@pytest.mark.parametrize("layout", ["TP2+SP", "PP2xVPP2"])
def test_no_layout_changes_iterations_depth_or_removals(layout, source, tmp_path):
    flags = [*target_flags({**WIDTHS, "num_layers": 2}), "--prune-iterations", 2]
    flags += ["--depth-importance", "kl", "--depth-rescore"]
    plans = []
    for name in ("TP1", layout):
        scores = tmp_path / f"{name} scores"
        plans.append(prune(source, tmp_path / name, *flags, "--scores", scores, layout=name))
        order = load_scores(scores).removal_order
        assert plans[-1].made["removal_order"] == [list(layers) for layers in order]
        assert sorted([*plans[-1].kept["layers"], *(layers[0] for layers in order)]) == [0, 1, 2, 3]
        assert plans[-1].made["depth"] == "kl, rescored"
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--depth-block 4", "--depth-block 4: the checkpoint has only 4 layers"),
        ("--depth-block 2 --target-num-layers 3", "removes 1 of 4 layers, --depth-block 2 at once"),
        (
            "--depth-block 2 --depth-rescore --target-num-layers 1",
            "removes 3 of 4 layers, not a multiple of --depth-block 2",
        ),
        ("--head-residual paper --target-num-attention-heads 1", "must be half of 4 or more"),
    ],
)
def test_bad_flags(flags, words, gpt2, tmp_path):
    argv = ["--load", gpt2, "--save", str(tmp_path / "save"), "--mock-data"]
    argv += ["--seq-length", "16", "--micro-batch-size", "1"]
    code, message = fail("prune", [*argv, *flags.split()])
    assert code == USAGE
    assert words in message


def test_virtual_stages_need_full_rounds_of_micro_batches(source, tmp_path):
    world_size, parallel = LAYOUTS["PP2xVPP2"]
    argv = ["--load", source[0], *source[1], "--save", str(tmp_path / "save"), *parallel.split()]
    code, message = fail("prune", [*argv, "--calibration-samples", "7"], world_size)
    assert code == USAGE
    assert "7 micro-batches of a rank: virtual stages need a multiple of" in message


def test_layers_go_by_the_scores_of_the_source(source, tmp_path):
    path = tmp_path / "scores"
    save_scores(path, with_vectors(LLAMA, layers=[1, 9, 8, 2]))
    flags = [*target_flags({**WIDTHS, "num_layers": 2}), "--prune-iterations", 2]
    plan = prune(source, tmp_path / "pruned", *flags, "--scores", path)
    assert plan.kept["layers"] == (1, 2)
    assert checkpoints.read(str(tmp_path / "pruned")).arch == plan.target


def test_a_block_of_layers_and_folded_heads(source, tmp_path):
    flags = target_flags({"num_layers": 2, "num_attention_heads": 2})
    flags += ["--depth-importance", "loss", "--depth-block", 2, "--head-residual", "paper"]
    plan = prune(source, tmp_path / "new", *flags, "--scores", tmp_path / "scores")
    scores = load_scores(tmp_path / "scores")
    start = scores.vectors["layer_blocks.2"].argmin().item()
    assert plan.kept["layers"] == tuple(i for i in range(4) if i not in (start, start + 1))
    assert plan.head_residual == "paper"
    again = prune(source, tmp_path / "again", *flags, "--scores", tmp_path / "scores")
    assert again == plan
