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

from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.layers import shard_positions
from megatron_ext.pruning import importance
from megatron_ext.pruning.aggregation import (
    DEFAULT,
    Aggregation,
    OverSamples,
    aggregate,
    sums_over_positions,
)
from megatron_ext.pruning.importance import Importance
from megatron_ext.pruning.scores import Scores
from megatron_ext.pruning.scores_file import check_scores
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import UserError
from megatron_ext.training.step import StepShape, Wrapped, evaluate
from tests.models import GPT2, LLAMA, random_batch
from tests.ranks import run_ranks

SEQ_LENGTH, NUM_SAMPLES = 8, 6
TAPS = ("ffn", "gate", "up", "heads", "norm0", "norm1", "before", "after")
KINDS = ("mean", "l2", "var")
ALL = [Aggregation(batch=batch, sequence=sequence) for batch in KINDS for sequence in KINDS]
# The other two choices, each once beside a mean and once beside a variance.
ALL += [
    Aggregation(neurons="pre", heads="aggregate-first"),
    Aggregation("var", "var", "pre", "aggregate-first"),
]
# Loss masks [S, n]: the last positions of some samples, all of one; and any positions.
PADDING = (torch.arange(SEQ_LENGTH).unsqueeze(1) < torch.tensor([8, 3, 0, 8, 5, 1])).float()
HOLES = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 0, 1], [1, 1, 1]]).repeat(2, 2)


# Naive reference: one global activation [S, n, C] per tap and layer, float64.


def aggregated(kind, x):  # the definitions of the paper over the first axis
    if kind == "mean":
        return np.abs(x).mean(axis=0)
    return np.sqrt((x**2).sum(axis=0)) if kind == "l2" else x.var(axis=0)


def reference(activations, aggregation=DEFAULT, mask=None):
    """Score the positions where ``mask`` [S, n] is not 0; a sample without any does not count."""
    kept = np.ones(activations[0]["ffn"].shape[:2], bool) if mask is None else mask.numpy() != 0

    def samples(x):
        return [x[kept[:, n], n] for n in range(x.shape[1]) if kept[:, n].any()]

    def scores(x):
        per_sample = np.stack([aggregated(aggregation.sequence, y) for y in samples(x)])
        return aggregated(aggregation.batch, per_sample)

    vectors, hidden, layers = {}, 0.0, []
    for number, layer in enumerate(activations):
        x = {tap: value.double().numpy() for tap, value in layer.items()}
        neurons = x["ffn"] if aggregation.neurons == "post" else x["gate"]
        vectors[f"ffn.{number}"] = scores(neurons)
        heads = x["heads"].reshape(*x["heads"].shape[:2], -1, LLAMA.kv_channels)
        if aggregation.heads == "norm-first":
            vectors[f"heads.{number}"] = scores(np.linalg.norm(heads, axis=-1))
        else:
            vectors[f"heads.{number}"] = np.linalg.norm(scores(heads), axis=-1)
        hidden = hidden + scores(x["norm0"]) + scores(x["norm1"])
        dots = (x["before"] * x["after"]).sum(axis=-1)
        norms = np.linalg.norm(x["before"], axis=-1) * np.linalg.norm(x["after"], axis=-1)
        layers.append(np.concatenate(samples(1 - dots / norms)).mean())
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


class WithBias(nn.Module):
    """As linear_fc1: hands its bias on, for the activation function to add."""

    def __init__(self):
        super().__init__()
        self.bias = None

    def forward(self, x):
        return x, self.bias


class FakeLayer(nn.Module):
    def __init__(self, layer_number):
        super().__init__()
        self.layer_number = layer_number
        self.input_layernorm, self.pre_mlp_layernorm = Echo(), Echo()
        self.self_attention, self.mlp = nn.Module(), nn.Module()
        self.self_attention.linear_qkv, self.self_attention.linear_proj = Echo(), Echo()
        self.mlp.linear_fc1, self.mlp.linear_fc2 = WithBias(), Echo()

    def forward(self, hidden_states, after):
        return after, None

    def run(self, x):
        self.mlp.linear_fc1(torch.cat([x["gate"], x["up"]], dim=-1))
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
    widths = dict.fromkeys(TAPS, arch.hidden_size) | {"heads": heads}
    widths |= dict.fromkeys(("ffn", "gate", "up"), arch.ffn_hidden_size)
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
    if tap in ("ffn", "gate", "up", "heads"):
        return part(x, 2, groups.tp)
    return part(x, 0, groups.tp) if sequence_parallel else x


def score_shards(
    layout, sequence_parallel, micro_batch_size, activations, settings=((DEFAULT, None),)
):
    """Return the scores of the same shards for each (aggregation, loss mask)."""
    groups = platform.initialize(**layout).groups
    return [
        score_with(groups, sequence_parallel, micro_batch_size, activations, *setting)
        for setting in settings
    ]


def score_with(groups, sequence_parallel, micro_batch_size, activations, aggregation, mask):
    numbers = part(torch.arange(len(activations)), 0, groups.pp).tolist()
    chunks = [FakeModel([number + 1]) for number in numbers]  # as many virtual stages as layers
    taps = Importance(
        chunks, LLAMA, groups, sequence_parallel=sequence_parallel, aggregation=aggregation
    )
    mask = torch.ones(SEQ_LENGTH, NUM_SAMPLES) if mask is None else mask
    mask = part(part(mask, 0, groups.cp), 1, groups.dp)
    with taps.attached():
        for number, chunk in zip(numbers, chunks, strict=True):
            mine = {
                tap: shard(tap, x, groups, sequence_parallel).split(micro_batch_size, dim=1)
                for tap, x in activations[number].items()
            }
            mine["mask"] = mask.split(micro_batch_size, dim=1)
            for micro_batch in zip(*mine.values(), strict=True):
                values = dict(zip(mine, micro_batch, strict=True))
                taps.expect(values.pop("mask").T)
                chunk.decoder.layers[0].run(values)
    return taps.collect()


TP2, CP2, PP2 = (
    {f"{kind}_parallel_size": 2} for kind in ("tensor_model", "context", "pipeline_model")
)


SETTINGS = [(aggregation, mask) for aggregation in ALL for mask in (None, PADDING, HOLES)]


@pytest.fixture(scope="module")
def expected_of_all():
    return [reference(random_activations(), *setting) for setting in SETTINGS]


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
    world_size, layout, sequence_parallel, micro_batch_size, expected_of_all
):
    args = (layout, sequence_parallel, micro_batch_size, random_activations(), SETTINGS)
    results = run_ranks(world_size, score_shards, *args)
    for number, expected in enumerate(expected_of_all):
        for vectors in (result[number] for result in results):
            assert_scores_equal(vectors, expected)
            assert all(torch.equal(vectors[name], results[0][number][name]) for name in vectors)
    scores = Scores(vectors=results[0][0], source=LLAMA, aggregation="", samples=6, seq_length=8)
    check_scores(scores, LLAMA)


def test_adding_finished_scores_of_positions_would_be_wrong():
    x = random_activations()[0]["norm0"]
    whole = x.abs().mean(0).square().sum(0)
    halves = [half.abs().mean(0).square().sum(0) for half in x.chunk(2)]
    assert not torch.allclose(whole, (halves[0] + halves[1]) / 2, rtol=1e-2)


def score_in_blocks(activations, numel):
    importance.BLOCK_NUMEL = {"cpu": numel}
    settings = [(Aggregation(sequence=kind), HOLES) for kind in KINDS]
    return score_shards({}, False, 4, activations, settings)


@pytest.mark.parametrize("numel", [1, 3 * 4 * LLAMA.hidden_size])
def test_blocks_of_positions_change_nothing(numel):
    """One position at a time; three, the last block two."""
    activations = random_activations()
    results = run_ranks(1, score_in_blocks, activations, numel)[0]
    for kind, vectors in zip(KINDS, results, strict=True):
        assert_scores_equal(vectors, reference(activations, Aggregation(sequence=kind), HOLES))


def test_half_precision_is_summed_in_float32():
    activations = random_activations(dtype=torch.bfloat16)
    settings = [(aggregation, None) for aggregation in ALL]
    results = run_ranks(1, score_shards, {}, False, 2, activations, settings)[0]
    for aggregation, vectors in zip(ALL, results, strict=True):
        assert_scores_equal(vectors, reference(activations, aggregation))


def test_padding_is_never_looked_at():
    activations, poisoned = random_activations(), random_activations()
    for layer in poisoned:
        for x in layer.values():
            x[PADDING == 0] = float("nan")
    for aggregation in (DEFAULT, Aggregation("var", "var")):
        args = ({}, False, 3, poisoned, [(aggregation, PADDING)])
        vectors = run_ranks(1, score_shards, *args)[0][0]
        assert_scores_equal(vectors, reference(activations, aggregation, PADDING))


def test_a_small_variance_beside_a_large_mean_keeps_its_digits():
    """Over positions in blocks, and over samples: x = 300 + noise, whose squares fill float32."""
    generator = torch.Generator().manual_seed(0)
    x = 300 + 0.1 * torch.randn(40, 9, 7, generator=generator)  # [s, n, c]
    samples = OverSamples(7, "mean", [], "cpu")
    ones, positions = torch.ones(9).double(), torch.full((9, 1), 40.0).double()
    samples.add(sums_over_positions("mean", x, None), positions, ones)
    over_samples = aggregate("var", samples.sums, samples.count)
    expected = x.double().mean(dim=0).var(dim=0, correction=0)
    torch.testing.assert_close(over_samples, expected, rtol=1e-2, atol=0)

    sums = sum(sums_over_positions("var", block, None) for block in x.split(16))
    over_positions = aggregate("var", sums, positions)
    expected = x.double().var(dim=0, correction=0)
    torch.testing.assert_close(over_positions, expected, rtol=1e-3, atol=0)


def test_before_the_activation_means_with_its_bias():
    activations = random_activations()
    (plain,), (shifted,) = (
        run_ranks(1, score_with_bias, activations, bias)[0] for bias in (0.0, 0.5)
    )
    assert_scores_equal(plain, reference(activations, Aggregation(neurons="pre")))
    for layer in activations:
        layer["gate"] = layer["gate"] + 0.5
    assert_scores_equal(shifted, reference(activations, Aggregation(neurons="pre")))


def score_with_bias(activations, bias):
    WithBias.__init__ = fixed_bias(2 * LLAMA.ffn_hidden_size, bias)
    return score_shards({}, False, 3, activations, [(Aggregation(neurons="pre"), None)])


def fixed_bias(length, value):
    def init(self):
        nn.Module.__init__(self)
        self.bias = torch.full((length,), value)

    return init


def test_a_layer_that_changes_nothing_scores_zero_and_one_that_reverses_scores_two():
    activations = random_activations()
    activations[1]["after"] = activations[1]["before"]
    activations[2]["after"] = -3 * activations[2]["before"]
    activations[3]["after"] = torch.zeros_like(activations[3]["after"])
    scores = run_ranks(1, score_shards, {}, False, 3, activations)[0][0]["layers"]
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
    taps.expect(torch.ones(x.shape[1::-1]))
    with taps.attached():
        linear(layer.input_layernorm(x))
    return next(t.samples.sums[1].float() for t in taps.listeners if t.axis.name == "hidden")


# Real models.


REAL = (DEFAULT, Aggregation("var", "var", "pre", "aggregate-first"))


def announced(both, batches):
    for batch in batches:
        for taps in both:
            taps.expect(batch["loss_mask"])
        yield batch


def score_model(arch, layout, options, micro_batch_size=1):
    """Return the scores of the aggregations ``REAL``, from one run."""
    place = platform.initialize(**layout)
    groups, options = place.groups, ModelOptions(**options)
    chunks = build_model(arch, options, groups, seed=7)
    sequence_parallel = options.sequence_parallel
    both = [
        Importance(chunks, arch, groups, sequence_parallel=sequence_parallel, aggregation=how)
        for how in REAL
    ]
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
    with both[0].attached(), both[1].attached():
        batches = [announced(both, micro_batches) for _ in chunks]
        evaluate(Wrapped(model=chunks, groups=groups), batches, shape, ["lm loss"])
    return [taps.collect() for taps in both]


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
        layer.mlp.linear_fc1.register_forward_hook(
            lambda _, a, y, i=i: keep(i, "gate", y[0].chunk(2, dim=-1)[0])
        )
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
    activations = run_ranks(1, capture_model, LLAMA)[0]
    mask = random_batch(LLAMA, num_samples=4, seq_length=16)["loss_mask"].T
    assert 0 < mask.mean() < 1
    return [reference(activations, aggregation, mask) for aggregation in REAL]


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
    for results in run_ranks(world_size, score_model, LLAMA, layout, options):
        for vectors, expected in zip(results, expected_of_llama, strict=True):
            assert_scores_equal(vectors, expected, rtol=1e-4)


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

    taps.expect(batch["loss_mask"])
    with taps.attached():
        tapped = run()
    return tapped, run(), [len(m._forward_hooks) for m in model.modules()]


def test_taps_change_neither_loss_nor_gradients_and_leave_no_hooks():
    tapped, plain, hooks = run_ranks(1, loss_and_gradients_with_and_without_taps, GPT2)[0]
    assert all(torch.equal(a, b) for a, b in zip(tapped, plain, strict=True))
    assert sum(hooks) == 0
