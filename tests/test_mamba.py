"""Mamba: the scan, the sub-layer M of a HybridModel, and what pruning cuts of it."""

from dataclasses import replace
from math import prod

import pytest
import torch
import torch.nn.functional as F
import transformers

from megatron_ext.arch import Arch, forward_flops, num_parameters, shape, weights
from megatron_ext.cli.programs import megatron_command_line
from megatron_ext.convert.config import arch_of
from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.mamba_scan import causal_conv, scan
from megatron_ext.pruning.budget import Use, kv_bytes
from megatron_ext.rehearsal.cost import Layout, layer_bytes
from megatron_ext.runtime import platform
from tests import test_families, test_layouts
from tests.models import LLAMA
from tests.ranks import run_ranks

HYBRID = replace(
    LLAMA,
    num_layers=6,
    hybrid_layer_pattern="M-M*-M",
    position_embedding_type="none",
    swiglu=False,
    squared_relu=True,
    mamba_num_heads=12,
    mamba_head_dim=6,
    mamba_num_groups=4,
    mamba_state_dim=5,
)


# The scan.


def naive_scan(x, dt, decay, b, c):
    """Return y, position by position."""
    length, batch, heads, channels = x.shape
    b, c = (each.repeat_interleave(heads // b.size(2), dim=2) for each in (b, c))
    state, y = torch.zeros(batch, heads, channels, b.size(3), dtype=x.dtype), []
    for t in range(length):
        state = (dt[t] * decay).exp()[..., None, None] * state
        state = state + (dt[t].unsqueeze(-1) * x[t]).unsqueeze(-1) * b[t].unsqueeze(-2)
        y.append((state * c[t].unsqueeze(-2)).sum(-1))
    return torch.stack(y)


def assert_same_function(found, expected, inputs, tolerance):
    """Compare two results of the same inputs, and the gradients of each."""
    both = [[y, *torch.autograd.grad(y.sin().sum(), inputs)] for y in (found, expected)]
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def scan_inputs(length, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=dtype)

    x, b, c = normal(length, 2, 6, 5), normal(length, 2, 3, 7), normal(length, 2, 3, 7)
    # From heads that forget within a token to such that forget nothing.
    decay = -torch.tensor([1e-3, 0.1, 1, 4, 16, 60], dtype=dtype)
    inputs = [x, F.softplus(normal(length, 2, 6)), decay, b, c]
    return [each.requires_grad_() for each in map(torch.Tensor.detach, inputs)]


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("length", [1, 5, 64, 65, 131])
def test_the_scan_is_the_recurrence(length, chunk):
    inputs = scan_inputs(length)
    assert_same_function(scan(*inputs, chunk=chunk), naive_scan(*inputs), inputs, 1e-10)


def test_the_scan_of_half_precision_is_computed_in_float32():
    inputs = [x.detach().bfloat16() for x in scan_inputs(70)]
    exact = scan(*(x.double() for x in inputs))
    found = scan(*inputs)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16(), rtol=2**-7, atol=1e-3)


def test_what_the_scan_keeps_for_backward_is_linear_in_the_sequence():
    def kept(length):
        inputs, numbers = scan_inputs(length), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: numbers.append(x.numel()) or x, lambda x: x
        ):
            scan(*inputs)
        return sum(numbers)

    assert kept(64 * 16) < 17 * kept(64)


def test_the_convolution_is_torchs():
    x = torch.randn(9, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 1, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    expected = F.conv1d(x.permute(1, 2, 0), weight, bias, padding=3, groups=5)[..., :9]
    found = causal_conv(x, weight, bias)
    assert_same_function(found, expected.permute(2, 0, 1), [x, weight, bias], 1e-12)


# Layouts.

MODELS = {
    "hybrid": (HYBRID, None),
    # Its states are copied to each context-parallel rank.
    "one group": (
        replace(HYBRID, hybrid_layer_pattern="M-*MM-M-", num_layers=8, mamba_num_groups=1),
        None,
    ),
    "hybrid beside hybrid": (replace(HYBRID, hidden_size=32, mamba_num_heads=8), HYBRID),
}
CASES = [
    *(("hybrid", x) for x in ("TP2", "TP2+SP", "PP2", "DP2", "CP2", "TP2xPP2", "DP2xTP2+SP")),
    *(("one group", x) for x in ("PP2xVPP2", "CP2")),
    *(("hybrid beside hybrid", x) for x in ("TP2+SP", "PP2", "CP2")),
]


@pytest.fixture(scope="module")
def serial():
    return {
        name: run_ranks(1, test_layouts.gradients_of_one_step, arch, {}, {}, teacher)[0]
        for name, (arch, teacher) in MODELS.items()
    }


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_loss_and_gradients_equal_serial(name, layout, serial):
    arch, teacher = MODELS[name]
    world_size, sizes, options = test_layouts.LAYOUTS[layout]
    results = run_ranks(
        world_size, test_layouts.gradients_of_one_step, arch, sizes, options, teacher
    )
    losses, gradients = serial[name]
    for rank_losses, _ in results:
        assert rank_losses == pytest.approx(losses, rel=1e-7)
    tolerance = 1e-8 if teacher is None else 1e-11
    shards = [x for _, each in results for x in each.items()]
    test_layouts.assert_gradients_equal(gradients, shards, tolerance)


FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def test_recomputed_layers_change_no_gradient(serial):
    options = {"recompute": FULL}
    ((losses, gradients),) = run_ranks(
        1, test_layouts.gradients_of_one_step, HYBRID, {}, options, None
    )
    assert losses == pytest.approx(serial["hybrid"][0], rel=1e-12)
    test_layouts.assert_gradients_equal(serial["hybrid"][1], list(gradients.items()), 1e-12)


def first_weights(layout):
    groups = platform.initialize(**layout).groups
    (model,) = build_model(HYBRID, ModelOptions(), groups, seed=3)
    mixer = model.decoder.layers[0].mixer
    return {name: x.detach() for name, x in mixer.named_parameters()}


def test_first_weights_are_drawn_as_megatron_core_does():
    (whole,) = run_ranks(1, first_weights, {})
    steps, decay = F.softplus(whole["dt_bias"]), whole["A_log"].exp()
    assert 1e-3 <= steps.min() < steps.max() <= 0.1
    assert 1 <= decay.min() < decay.max() <= 16
    for name in ("conv1d_weight", "conv1d_bias"):
        assert 0.4 < whole[name].abs().max() <= 0.5
    assert torch.equal(whole["D"], torch.ones(12))
    shares = run_ranks(2, first_weights, {"tensor_model_parallel_size": 2})
    for name in ("dt_bias", "A_log"):
        assert torch.equal(torch.cat([share[name] for share in shares]), whole[name])


# Sizes.

NANO_9B = {
    "model_type": "nemotron_h",
    "hidden_size": 4480,
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 15680,
    "mamba_num_heads": 128,
    "mamba_head_dim": 80,
    "n_groups": 8,
    "ssm_state_size": 128,
    "vocab_size": 131072,
    "max_position_embeddings": 131072,
}
NEMOTRON_H_8B = NANO_9B | {
    "hidden_size": 4096,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    "num_attention_heads": 32,
    "intermediate_size": 21504,
    "mamba_head_dim": 64,
}


@pytest.mark.parametrize(
    ("config", "expected"), [(NANO_9B, 8_888_227_328), (NEMOTRON_H_8B, 8_100_852_736)]
)
def test_parameter_counts_of_published_models(config, expected):
    arch = arch_of(config)
    assert num_parameters(arch) == expected
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config)
        )
    assert sum(x.numel() for x in model.parameters()) == expected


def test_logits_are_those_of_transformers(tmp_path):
    values = test_families.CONFIGS["nemotron_h"]
    model = test_families.random_model("nemotron_h", values)
    expected = test_families.logits_of(model, test_families.ROWS)
    model.save_pretrained(tmp_path)
    ((found,),) = run_ranks(1, test_families.imported, [str(tmp_path)])
    assert test_families.difference(found, expected) < 1e-5


def test_operations_of_a_token():
    """Two per weight of a matrix, and what the scan multiplies in chunks of 128."""
    arch = with_pattern("M*")
    without = with_pattern("*")
    matrices = sum(
        prod(shape(w, arch)) for w in weights(arch) if w.kind == "mamba" and len(w.dims) > 1
    )
    for length in (16, 500):
        states = 2 * 72 * 5 + min(length, 128) * (72 + 4 * 5)
        more = forward_flops(arch, length) - forward_flops(without, length)
        assert more == 2 * (matrices + states)


def with_pattern(pattern):
    return HYBRID.with_sublayers(pattern)


def test_a_rank_keeps_its_share_of_the_heads():
    layout = Layout(world_size=1, seq_length=16)
    split = replace(layout, world_size=2, tensor_model_parallel_size=2, sequence_parallel=True)
    arch = with_pattern("M")
    elements = 2 * 48 + 4 * 72 + 2 * 20 + 12  # norm in and out; z x B C dt, y twice
    assert layer_bytes(arch, layout) == 16 * 2 * elements
    assert layer_bytes(arch, split) == 16 * 2 * elements / 2


def test_a_cache_has_states_that_no_context_makes_longer():
    arch = with_pattern("M*M")
    attention, states = 2 * 2 * 16, 72 * 5 + 4 * (72 + 2 * 20)
    for context in (10, 1000):
        expected = 3 * 2 * (attention * context + 2 * states)  # 3 sequences in bf16
        assert kv_bytes(arch, Use(context, 3)) == expected


def test_what_saved_args_say():
    assert Arch.from_args(HYBRID.to_args()) == HYBRID
    args = HYBRID.to_args() | {"mamba_num_heads": None, "mamba_head_dim": 12}
    assert Arch.from_args(args).mamba_num_heads == 8  # twice 48 channels
    old = HYBRID.to_args() | {"hybrid_override_pattern": HYBRID.hybrid_layer_pattern}
    del old["hybrid_layer_pattern"]
    assert Arch.from_args(old) == HYBRID
    plain = LLAMA.to_args() | {"mamba_head_dim": 80, "mamba_num_heads": 3}
    assert Arch.from_args(plain) == LLAMA
    typed = megatron_command_line(HYBRID)
    assert "--mamba-num-heads 12" in typed
    assert "mamba" not in megatron_command_line(LLAMA)
    for change, words in (
        ({"mamba_num_heads": None}, "an M needs --mamba-num-heads"),
        ({"mamba_num_heads": 10}, "--mamba-num-heads 10 is not a multiple of --mamba-num-groups 4"),
        ({"hybrid_layer_pattern": "*-*-*-"}, "--mamba-num-heads needs an M in --hybrid-layer-p"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(HYBRID, **change)
    assert with_pattern("*-").mamba_num_heads is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hybrid_override_pattern", "ME*-"),
        ("layers_block_type", ["mamba", "moe"]),
        ("time_step_min", 0.01),
        ("layer_norm_epsilon", 1e-6),
        ("conv_kernel", 3),
        ("use_conv_bias", False),
        ("mlp_hidden_act", "silu"),
    ],
)
def test_what_is_not_computed_is_refused(key, value):
    with pytest.raises(ValueError, match="not computed here"):
        arch_of(NANO_9B | {key: value})
