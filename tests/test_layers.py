"""Norm and attention against naive float64 references."""

import math
from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_ext.model.config import ModelOptions, transformer_config
from megatron_ext.model.layers import Attention, Norm
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import UserError
from tests.models import LLAMA, NEMOTRON
from tests.ranks import run_ranks


def _naive_norm(x, weight, bias, eps, *, rms):
    x = x if rms else x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def _norm_error(normalization, zero_centred, dtype):
    place = platform.initialize()
    arch = replace(LLAMA, normalization=normalization, apply_layernorm_1p=zero_centred)
    config = transformer_config(arch, ModelOptions(params_dtype=dtype), place.groups)
    norm = Norm(config, 37)
    assert torch.equal(norm.weight, torch.full((37,), float(not zero_centred), dtype=dtype))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    x = torch.randn(3, 5, 37, dtype=torch.float64) * 4 + 1
    weight = norm.weight.double() + zero_centred
    bias = norm.bias.double() if normalization == "LayerNorm" else 0.0
    rounded = x.to(dtype).double()
    expected = _naive_norm(rounded, weight, bias, 1e-5, rms=normalization == "RMSNorm")
    return (norm(x.to(dtype)).double() - expected).abs().max().item()


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.1)]
)
def test_norm(normalization, zero_centred, dtype, tolerance):
    (error,) = run_ranks(1, _norm_error, normalization, zero_centred, dtype)
    assert error < tolerance


def _naive_attention(query, key, value, mask):
    """Return [s, b, a * d]; ``mask`` [s, S] is true where a query must not look."""
    repeats = query.size(2) // key.size(2)
    key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
    scores = torch.einsum("sbad,tbad->bast", query, key) / math.sqrt(query.size(-1))
    weights = scores.masked_fill(mask, -math.inf).softmax(-1)
    return torch.einsum("bast,tbad->sbad", weights, value).flatten(2)


def _attention_error(kind):
    place = platform.initialize()
    arch = replace(NEMOTRON, window_size="2,0" if "window" in kind else None)
    config = transformer_config(arch, ModelOptions(params_dtype=torch.float64), place.groups)
    mask_type = AttnMaskType.no_mask if kind == "none" else AttnMaskType.causal
    attention = Attention(config, 1, mask_type, "self", pg_collection=place.groups)
    torch.manual_seed(1)
    inputs = [torch.randn(7, 2, heads, 12, dtype=torch.float64) for heads in (8, 2, 2)]
    ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    causal = torch.ones(7, 7).triu(1).bool()
    mask = torch.zeros(7, 7).bool() if kind == "none" else causal
    given = None
    if "documents" in kind:
        mask[4:, :4] = True  # a document ends after four tokens
        given = mask[None, None].clone()
    if "window" in kind:
        mask = mask | torch.ones(7, 7).tril(-3).bool()
    output = attention(*ours, given)
    expected = _naive_attention(*theirs, mask)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    expected.backward(gradient)
    pairs = [(output, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("kind", ["causal", "none", "documents", "window", "window and documents"])
def test_attention_and_its_gradients(kind):
    (error,) = run_ranks(1, _attention_error, kind)
    assert error < 1e-12


def refused_by_the_engine(arch):
    groups = platform.initialize(context_parallel_size=2).groups
    with pytest.raises(UserError) as caught:
        transformer_config(arch, ModelOptions(transformer_impl="transformer_engine"), groups)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": "7,0"}, "--cp-comm-type p2p: Transformer Engine's attention has no"),
        ({"sandwich_norm": True}, "need --transformer-impl local."),
    ],
)
def test_what_the_engine_does_not_compute_is_refused(change, message):
    for said in run_ranks(2, refused_by_the_engine, replace(LLAMA, **change)):
        assert message in said
