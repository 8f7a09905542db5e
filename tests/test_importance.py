"""Importance against a naive numpy reference, for every way to spread samples and activations.

First with modules that hand through given activations, so that ranks get shards of one global
tensor; then with real models.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch import nn

from megatron_ext import platform
from megatron_ext.errors import UserError
from megatron_ext.layers import shard_positions
from megatron_ext.model import ModelOptions, build_model
from megatron_ext.pruning import importance
from megatron_ext.pruning.importance import Importance
from megatron_ext.pruning.scores import Scores, check_scores
from megatron_ext.training.step import StepShape, evaluate
from tests.models import GPT2, LLAMA, random_batch
from tests.ranks import run_ranks

SEQ_LENGTH, NUM_SAMPLES = 8, 6
TAPS = ("ffn", "heads", "norm0", "norm1", "before", "after")


# Naive reference: one global activation [S, n, C] per tap and layer, float64.


def reference(activations):
    def l2_of_means(x):  # [S, n, C] -> [C]
        return np.sqrt((np.abs(x).mean(axis=0) ** 2).sum(axis=0))

    vectors, hidden, layers = {}, 0.0, []
    for number, layer in enumerate(activations):
        x = {tap: layer[tap].double().numpy() for tap in TAPS}
        vectors[f"ffn.{number}"] = l2_of_means(x["ffn"])
        heads = x["heads"].reshape(*x["heads"].shape[:2], -1, LLAMA.kv_channels)
        vectors[f"heads.{number}"] = l2_of_means(np.sqrt((heads**2).sum(axis=-1)))
        hidden = hidden + l2_of_means(x["norm0"]) + l2_of_means(x["norm1"])
        dots = (x["before"] * x["after"]).sum(axis=-1)
        norms = np.linalg.norm(x["before"], axis=-1) * np.linalg.norm(x["after"], axis=-1)
        layers.append((1 - dots / norms).mean())
    return vectors | {"hidden": hidden, "layers": np.array(layers)}


def assert_scores_equal(vectors, expected, rtol=1e-5):
    assert vectors.keys() == expected.keys()
    for name, vector in vectors.items():
        assert vector.dtype == torch.float32
        np.testing.assert_allclose(
            vector.numpy(), expected[name], rtol=rtol, atol=1e-6, err_msg=name
        )


# Modules that hand activations through.


class Echo(nn.Module):
    def forward(self, x):
        return x


class FakeLayer(nn.Module):
    def __init__(self, layer_number):
        super().__init__()
        self.layer_number = layer_number
        self.input_layernorm, self.pre_mlp_layernorm = Echo(), Echo()
        self.self_attention, self.mlp = nn.Module(), nn.Module()
        self.self_attention.linear_qkv, self.self_attention.linear_proj = Echo(), Echo()
        self.mlp.linear_fc1, self.mlp.linear_fc2 = Echo(), Echo()

    def forward(self, hidden_states, after):
        return after, None

    def run(self, x):
        self.mlp.linear_fc2(x["ffn"])
        self.self_attention.linear_proj(x["heads"])
        self.input_layernorm(x["norm0"])
        self.pre_mlp_layernorm(x["norm1"])
        self(hidden_states=x["before"], after=x["after"])


class FakeModel(nn.Module):
    def __init__(self, layer_numbers):
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(FakeLayer(number) for number in layer_numbers)
        self.weight = nn.Parameter(torch.zeros(1))


def random_activations(arch=LLAMA, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    heads = arch.num_attention_heads * arch.kv_channels
    widths = dict.fromkeys(TAPS, arch.hidden_size) | {"ffn": arch.ffn_hidden_size, "heads": heads}
    return [
        {
            tap: torch.randn(SEQ_LENGTH, NUM_SAMPLES, width, generator=generator).to(dtype)
            for tap, width in widths.items()
        }
        for _ in range(arch.num_layers)
    ]


def part(x, dim, group):
    return x.chunk(group.size(), dim)[group.rank()]


def shard(tap, x, groups, sequence_parallel):
    x = part(part(x, 0, groups.cp), 1, groups.dp)
    if tap in ("ffn", "heads"):
        return part(x, 2, groups.tp)
    return part(x, 0, groups.tp) if sequence_parallel else x


def score_shards(layout, sequence_parallel, micro_batch_size, activations):
    groups = platform.initialize(**layout).groups
    numbers = part(torch.arange(len(activations)), 0, groups.pp).tolist()
    chunks = [FakeModel([number + 1]) for number in numbers]  # as many virtual stages as layers
    taps = Importance(chunks, LLAMA, groups, sequence_parallel=sequence_parallel)
    with taps.attached():
        for number, chunk in zip(numbers, chunks, strict=True):
            mine = {
                tap: shard(tap, x, groups, sequence_parallel).split(micro_batch_size, dim=1)
                for tap, x in activations[number].items()
            }
            for micro_batch in zip(*mine.values(), strict=True):
                chunk.decoder.layers[0].run(dict(zip(mine, micro_batch, strict=True)))
    return taps.collect()


TP2, CP2, PP2 = (
    {f"{kind}_parallel_size": 2} for kind in ("tensor_model", "context", "pipeline_model")
)


@pytest.mark.parametrize(
    ("world_size", "layout", "sequence_parallel", "micro_batch_size"),
    [
        (1, {}, False, 6),
        (1, {}, False, 4),  # the last micro-batch is smaller
        (1, {}, False, 1),
        (2, {}, False, 2),  # data parallel
        (2, TP2, False, 3),
        (2, TP2, True, 3),
        (2, CP2, False, 2),
        (2, PP2, False, 2),
        (4, TP2 | CP2, True, 3),
        (4, TP2 | PP2, False, 6),
        (4, CP2, False, 1),  # and data parallel
    ],
)
def test_scores_do_not_depend_on_the_layout(
    world_size, layout, sequence_parallel, micro_batch_size
):
    activations = random_activations()
    expected = reference(activations)
    results = run_ranks(
        world_size, score_shards, layout, sequence_parallel, micro_batch_size, activations
    )
    for vectors in results:
        assert_scores_equal(vectors, expected)
        assert all(torch.equal(vectors[name], results[0][name]) for name in vectors)
    scores = Scores(vectors=results[0], source=LLAMA, aggregation="", samples=6, seq_length=8)
    check_scores(scores, LLAMA)


def test_adding_finished_scores_of_positions_would_be_wrong():
    x = random_activations()[0]["norm0"]
    whole = x.abs().mean(0).square().sum(0)
    halves = [half.abs().mean(0).square().sum(0) for half in x.chunk(2)]
    assert not torch.allclose(whole, (halves[0] + halves[1]) / 2, rtol=1e-2)


def score_in_blocks(activations, numel):
    importance.BLOCK_NUMEL = numel
    return score_shards({}, False, 4, activations)


def test_blocks_of_positions_change_nothing():
    activations = random_activations()
    for numel in (
        1,
        3 * 4 * LLAMA.hidden_size,
    ):  # one position at a time; three, the last block two
        vectors = run_ranks(1, score_in_blocks, activations, numel)[0]
        assert_scores_equal(vectors, reference(activations))


def test_half_precision_is_summed_in_float32():
    activations = random_activations(dtype=torch.bfloat16)
    assert_scores_equal(
        run_ranks(1, score_shards, {}, False, 2, activations)[0], reference(activations)
    )


def test_a_layer_that_changes_nothing_scores_zero_and_one_that_reverses_scores_two():
    activations = random_activations()
    activations[1]["after"] = activations[1]["before"]
    activations[2]["after"] = -3 * activations[2]["before"]
    activations[3]["after"] = torch.zeros_like(activations[3]["after"])
    scores = run_ranks(1, score_shards, {}, False, 3, activations)[0]["layers"]
    assert scores[1:] == pytest.approx([0, 2, 1], abs=1e-6)
    assert ((scores >= 0) & (scores <= 2)).all()


def message_of_collect(layout, activations):
    try:
        score_shards(layout, False, 1, activations)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("layout", "tap", "axis"),
    [({}, "ffn", "ffn"), (TP2, "norm1", "hidden"), (PP2, "after", "layers")],
)
def test_activations_that_are_not_finite_are_an_error_on_every_rank(layout, tap, axis):
    activations = random_activations()
    activations[2][tap][1, 4, 0] = float("nan") if axis == "ffn" else float("inf")
    messages = run_ranks(2, message_of_collect, layout, activations)
    assert all(f"layer 2 (from 0): activations that score the axis '{axis}'" in m for m in messages)


def message_without_samples():
    groups = platform.initialize(**TP2).groups
    try:
        Importance([FakeModel([1])], LLAMA, groups, sequence_parallel=False).collect()
    except UserError as error:
        return str(error)


def test_no_samples_are_an_error_on_every_rank():
    messages = run_ranks(2, message_without_samples)
    assert all("no calibration sample" in message for message in messages)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_a_norm_inside_the_following_linear_layer_is_scored_by_its_output(normalization):
    x = random_activations()[0]["norm0"]
    weight, bias = torch.linspace(-1, 1, 48), torch.linspace(0, 2, 48)
    fused = score_fused_norm_alone(normalization, x, weight, bias)
    y = x - x.mean(-1, keepdim=True) if normalization == "LayerNorm" else x
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + weight)
    y = y + bias if normalization == "LayerNorm" else y
    torch.testing.assert_close(fused, y.abs().mean(0).square().sum(0), rtol=1e-5, atol=1e-6)


def score_fused_norm_alone(normalization, x, weight, bias):
    return run_ranks(1, score_fused_norm, normalization, x, weight, bias)[0]


def score_fused_norm(normalization, x, weight, bias):
    groups = platform.initialize().groups
    model = FakeModel([1])
    layer = model.decoder.layers[0]
    layer.input_layernorm = IdentityOp()
    linear = layer.self_attention.linear_qkv
    linear.layer_norm_weight, linear.layer_norm_bias = weight, bias
    linear.normalization, linear.eps, linear.zero_centered_gamma = normalization, 1e-5, True
    taps = Importance([model], replace(LLAMA, num_layers=1), groups, sequence_parallel=False)
    with taps.attached():
        linear(layer.input_layernorm(x))
    return next(t.accumulator.total for t in taps.taps if t.axis == "hidden")


# Real models.


def score_model(arch, layout, options, micro_batch_size=1):
    place = platform.initialize(**layout)
    groups, options = place.groups, ModelOptions(**options)
    chunks = build_model(arch, options, groups, seed=7)
    taps = Importance(chunks, arch, groups, sequence_parallel=options.sequence_parallel)
    batch = random_batch(arch, num_samples=4, seq_length=16)
    positions = shard_positions(16 // groups.cp.size(), groups.cp, groups.cp.rank())
    mine = {key: part(x, 0, groups.dp)[:, positions] for key, x in batch.items()}
    split = {key: x.split(micro_batch_size) for key, x in mine.items()}
    micro_batches = [
        dict(zip(split, parts, strict=True)) for parts in zip(*split.values(), strict=True)
    ]
    shape = StepShape(
        num_microbatches=len(micro_batches), micro_batch_size=micro_batch_size, seq_length=16
    )
    with taps.attached():
        evaluate(chunks, [iter(micro_batches) for _ in chunks], shape, ["lm loss"], groups)
    return taps.collect()


def capture_model(arch):
    """Return every tap's activations of a serial run, from hooks of this test."""
    groups = platform.initialize().groups
    (model,) = build_model(arch, ModelOptions(), groups, seed=7)
    layers = list(model.decoder.layers)
    seen = [{} for _ in layers]

    def keep(number, tap, value):
        seen[number][tap] = value.detach().clone()

    for i, layer in enumerate(layers):
        layer.mlp.linear_fc2.register_forward_pre_hook(lambda _, a, i=i: keep(i, "ffn", a[0]))
        layer.self_attention.linear_proj.register_forward_pre_hook(
            lambda _, a, i=i: keep(i, "heads", a[0])
        )
        layer.input_layernorm.register_forward_hook(lambda _, a, y, i=i: keep(i, "norm0", y))
        layer.pre_mlp_layernorm.register_forward_hook(lambda _, a, y, i=i: keep(i, "norm1", y))
        layer.input_layernorm.register_forward_pre_hook(lambda _, a, i=i: keep(i, "before", a[0]))
    # The input of a layer is the output of the one before.
    model.decoder.final_layernorm.register_forward_pre_hook(
        lambda _, a: keep(len(layers) - 1, "after", a[0])
    )
    batch = random_batch(arch, num_samples=4, seq_length=16)
    model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    for below, above in itertools.pairwise(seen):
        below["after"] = above["before"]
    return seen


@pytest.fixture(scope="module")
def expected_of_llama():
    return reference(run_ranks(1, capture_model, LLAMA)[0])


@pytest.mark.parametrize(
    ("world_size", "layout", "options"),
    [
        (1, {}, {}),
        (2, TP2, {"sequence_parallel": True}),
        (2, CP2, {}),
        (2, PP2, {"pipeline_model_parallel_layout": "Et|tttL"}),
        (
            2,
            PP2 | {"virtual_pipeline_model_parallel_size": 2},
            {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True},
        ),
        (4, TP2, {"sequence_parallel": True}),
    ],
)
def test_scores_of_a_real_model(world_size, layout, options, expected_of_llama):
    for vectors in run_ranks(world_size, score_model, LLAMA, layout, options):
        assert_scores_equal(vectors, expected_of_llama, rtol=1e-4)


def loss_and_gradients_with_and_without_taps(arch):
    groups = platform.initialize().groups
    (model,) = build_model(arch, ModelOptions(), groups, seed=7)
    taps = Importance([model], arch, groups, sequence_parallel=False)
    batch = random_batch(arch, num_samples=2, seq_length=16)

    def run():
        model.zero_grad()
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        losses.sum().backward()
        return [losses.detach(), *(p.grad.clone() for p in model.parameters())]

    with taps.attached():
        tapped = run()
    return tapped, run(), [len(m._forward_hooks) for m in model.modules()]


def test_taps_change_neither_loss_nor_gradients_and_leave_no_hooks():
    tapped, plain, hooks = run_ranks(1, loss_and_gradients_with_and_without_taps, GPT2)[0]
    assert all(torch.equal(a, b) for a, b in zip(tapped, plain, strict=True))
    assert sum(hooks) == 0
