"""Models of sub-layers: the pattern, the model of it, and depth cut in single sub-layers."""

from dataclasses import replace

import pytest
import torch

from megatron_ext.model.build import ModelOptions, build_model
from megatron_ext.runtime import platform
from tests.models import GPT2, LLAMA, NEMOTRON, random_batch
from tests.ranks import run_ranks

ROPE = replace(LLAMA, use_rope_scaling=True, num_layers=2)
PLAIN = {"llama": ROPE, "gpt2": replace(GPT2, num_layers=3), "nemotron": NEMOTRON}
DOUBLE = {"params_dtype": torch.float64}


def losses_and_gradients(arch, options):
    """Return losses [b, s], logits and gradients of one step, by position in the pattern."""
    groups = platform.initialize().groups
    (model,) = build_model(arch, ModelOptions(**options), groups, seed=3)
    batch = random_batch(arch, num_samples=2, seq_length=16)
    inputs = batch["tokens"], batch["position_ids"], None
    loss = model(*inputs, labels=batch["labels"])
    loss.sum().backward()
    grads = {
        name.replace("final_layernorm", "final_norm"): p.grad
        for name, p in model.named_parameters()
    }
    with torch.no_grad():
        return loss.detach(), model(*inputs), grads


@pytest.mark.parametrize("name", PLAIN)
def test_a_pattern_of_whole_layers_computes_what_a_gpt_model_does(name):
    arch = PLAIN[name]
    (gpt,) = run_ranks(1, losses_and_gradients, arch, {})
    (hybrid,) = run_ranks(1, losses_and_gradients, arch.by_sublayers(), {})
    assert torch.equal(gpt[0], hybrid[0])
    assert torch.equal(gpt[1], hybrid[1])
    assert len(gpt[2]) == len(hybrid[2])
    for key, grad in hybrid[2].items():
        head, _, rest = key.partition(".layers.")
        if rest:
            number, _, rest = rest.partition(".")
            key = f"{head}.layers.{int(number) // 2}.{rest}"
        assert torch.equal(grad, gpt[2][key]), key
