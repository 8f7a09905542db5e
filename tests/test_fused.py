"""The fused output layer against the plain one: losses, gradients, what is held in memory."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.distillation import fused
from megatron_ext.distillation.fused import fused_losses
from megatron_ext.distillation.losses import LogitLoss
from tests.models import BERT, GPT2, LLAMA, WINDOWS
from tests.programs import data_flags, read_metrics, succeed, write_corpus, write_model
from tests.ranks import run_ranks
from tests.test_layouts import LAYOUTS, assert_gradients_equal, gradients_of_one_step

GPTS = {
    "untied": (replace(LLAMA, hidden_size=32, ffn_hidden_size=48), LLAMA),
    "tied beside tied": (GPT2, replace(GPT2, hidden_size=24)),
}
# Its output layer has a bias, and a head before it.
MODELS = GPTS | {
    "bert": (BERT, replace(BERT, hidden_size=24)),
    "scaled": (replace(WINDOWS, hidden_size=32), WINDOWS),  # both divide their logits
}
LOSSES = {
    "kl": {"logit_loss": LogitLoss(temperature=2.0)},
    "top-k with tail, lm": {
        "logit_loss": LogitLoss(top_k=5, top_k_rest="tail"),
        "lm_loss_weight": 0.5,
    },
}


def fused_step(arch, layout, options, teacher, settings):
    """As without fusion, with chunks of 5 positions (16 are no multiple of it)."""
    fused.CHUNK_TOKENS["cpu"] = 5
    return gradients_of_one_step(
        arch, layout, options, teacher, fused_output=True, **LOSSES[settings]
    )


def plain_step(arch, teacher, settings):
    return gradients_of_one_step(arch, {}, {}, teacher, **LOSSES[settings])


@pytest.fixture(scope="module")
def serial():
    return {
        (name, settings): run_ranks(1, plain_step, *models, settings)[0]
        for (name, models), settings in product(MODELS.items(), LOSSES)
    }


CASES = [
    *product(GPTS, ["one rank", *LAYOUTS], ["kl"]),
    *product(GPTS, ["one rank", "TP2+SP", "PP2", "CP2"], ["top-k with tail, lm"]),
    *product(["scaled"], ["one rank", "CP2"], ["kl"]),
    *product(["bert"], ["one rank", "TP2", "TP2+SP"], ["kl"]),
]


@pytest.mark.parametrize(("name", "layout", "settings"), CASES)
def test_gradients_equal_those_of_whole_logits_on_one_rank(name, layout, settings, serial):
    arch, teacher = MODELS[name]
    world_size, sizes, options = LAYOUTS.get(layout, (1, {}, {}))
    results = run_ranks(world_size, fused_step, arch, sizes, options, teacher, settings)
    losses, gradients = serial[name, settings]
    for rank_losses, _ in results:
        assert rank_losses == pytest.approx(losses, rel=1e-7)
    tolerance = 1e-11 if settings == "kl" else 1e-8
    assert_gradients_equal(gradients, [x for _, g in results for x in g.items()], tolerance)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, in elements."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_has_the_size_of_the_logits(dtype, monkeypatch):
    positions, samples, width, vocab = 64, 2, 8, 512
    monkeypatch.setitem(fused.CHUNK_TOKENS, "cpu", 4 * samples)
    torch.manual_seed(0)
    states, weight, others, other_weight = (
        torch.randn(*size, dtype=dtype)
        for size in [(positions, samples, width), (vocab, width)] * 2
    )
    loss = LogitLoss()

    def losses(student, teacher, labels):
        return {"kd": loss(student, teacher).transpose(0, 1)}

    inputs = [states.requires_grad_(), weight.requires_grad_()]
    labels = torch.zeros(samples, positions, dtype=torch.int64)
    mask = (torch.arange(positions) % 3 > 0).float().expand(samples, positions)
    with Largest() as largest:
        models = (*inputs, others, other_weight)
        found = fused_losses(losses, {"kd": 0.5}, *models, labels, mask)["kd"]
        (1.7 * found * mask).sum().backward()
    gradients = [x.grad.clone() for x in inputs]
    assert largest.numel <= 2 * 4 * samples * vocab  # a loss works on both models' chunks
    assert largest.numel < positions * samples * vocab / 4

    for x in inputs:
        x.grad = None
    plain = losses(states @ weight.t(), others @ other_weight.t(), labels)["kd"]
    (1.7 * plain * mask).sum().backward()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, plain, **tolerance)
    for x, gradient in zip(inputs, gradients, strict=True):
        torch.testing.assert_close(gradient, x.grad, **tolerance)


def test_the_program_reports_the_same(tmp_path):
    write_model(str(tmp_path / "teacher"), LLAMA)
    write_model(str(tmp_path / "student"), MODELS["untied"][0])
    corpus = write_corpus(tmp_path / "corpus", LLAMA.vocab_size)
    train = ["--train-iters", "3", "--lr", "1e-2", "--global-batch-size", "4"]
    train += ["--log-interval", "1", "--eval-interval", "3", "--eval-iters", "1"]
    train += ["--kd-lm-loss-weight", "0.3", "--save-interval", "3"]
    where = ["--load", str(tmp_path / "student"), "--teacher-load", str(tmp_path / "teacher")]
    found = {}
    for name, flags, ranks in (
        ("plain", [], 1),
        ("fused", ["--kd-fused-output", "--tensor-model-parallel-size", "2"], 2),
    ):
        save = ["--save", str(tmp_path / name)]
        argv = [*data_flags(LLAMA, corpus), *train, *where, *save, *flags]
        succeed("pretrain_distill", argv, ranks)
        found[name] = read_metrics(str(tmp_path / name))
    for plain, other in zip(found["plain"], found["fused"], strict=True):
        assert other == pytest.approx(plain, rel=1e-4)
