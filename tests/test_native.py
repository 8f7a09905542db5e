"""The kernels in C against the same steps in torch, and where they decline."""

import math
import os
import shutil
from functools import partial

import pytest
import torch

from megatron_ext.distillation import losses_c, native, steps
from megatron_ext.distillation.losses import vocab_parallel_kl
from megatron_ext.distillation.row_stats import row_stats
from megatron_ext.runtime import compiled
from tests.test_losses import in_torch

pytestmark = pytest.mark.skipif(
    compiled.library(losses_c.SOURCE) is None, reason="there is no C compiler"
)


def logits(columns, dtype, scale=3.0):
    generator = torch.Generator().manual_seed(columns)
    student, noise = torch.randn(2, 7, 3, columns, generator=generator)
    return (scale * student).to(dtype), (scale * student + 0.3 * noise).to(dtype)


def loss_and_gradient(student, teacher, **settings):
    student = student.clone().requires_grad_()
    loss = vocab_parallel_kl(student, teacher, **settings)
    loss.backward(torch.linspace(-1, 2, loss.numel()).view_as(loss))
    return loss.detach(), student.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 100, 1024 + 5, 5000])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
def test_kernels_equal_torch(columns, padding, temperature, dtype, monkeypatch):
    student, teacher = logits(columns + padding, dtype)
    settings = {"temperature": temperature, "vocab_size": columns}
    assert native.kernels(student, teacher, columns) is losses_c
    loss, gradient = loss_and_gradient(student, teacher, **settings)
    in_torch(monkeypatch)
    expected, reference = loss_and_gradient(student, teacher, **settings)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=5e-7)
    # Neighbours in bfloat16 are up to 2^-7 apart. Float32 rounds p_s and p_t, not their difference.
    rounding = {"rtol": 2**-7 if dtype == torch.bfloat16 else 1e-5, "atol": 2e-7 * 2 / temperature}
    torch.testing.assert_close(gradient, reference, **rounding)
    assert not gradient[..., columns:].any()


@pytest.mark.parametrize("columns", [100, 40_000])
def test_sums_of_long_rows_in_float64(columns):
    student, teacher = logits(columns, torch.float32)
    stats = row_stats(student, teacher, 1.0, columns).double()
    for number, x in enumerate((student.double(), teacher.double())):
        highest = x.amax(-1)
        assert torch.equal(stats[number], highest)
        sums = (x - highest.unsqueeze(-1)).exp().sum(-1)
        torch.testing.assert_close(stats[2 + number], sums, rtol=3e-7, atol=0)


def test_threads_change_nothing():
    student, teacher = logits(3000, torch.float32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(loss_and_gradient(student, teacher))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 20, 99])
def test_what_is_not_finite_comes_out(bad, place):
    student, teacher = logits(100, torch.float32)
    student[2, 1, place] = bad
    loss, _ = loss_and_gradient(student, teacher)
    assert not loss[2, 1].isfinite()
    loss[2, 1] = 0
    assert loss.isfinite().all()


def test_where_they_decline():
    student, teacher = logits(64, torch.float32)
    assert native.kernels(student, teacher, 64) is losses_c
    assert native.kernels(student.double(), teacher.double(), 64) is None
    assert native.kernels(student, teacher.bfloat16(), 64) is None
    assert native.kernels(student.transpose(0, 1), teacher.transpose(0, 1), 64) is None
    assert native.kernels(student, teacher, 0) is None
    assert native.kernels(student.to("meta"), teacher.to("meta"), 64) is None


def test_a_loss_without_kernels_is_computed_in_torch():
    """Regression: a new loss ended in a KeyError in C, and had jsd's gradient in Triton."""
    student, teacher = logits(64, torch.float32)
    assert native.kernels(student, teacher, 64, gradient_of="mse") is losses_c
    assert native.kernels(student, teacher, 64, gradient_of="new") is None
    new = steps.MSE._replace(loss="new")
    gradients = []
    for loss in (steps.MSE, new):
        leaf = student.clone().requires_grad_()
        steps.per_token_loss(loss, leaf, teacher, 1.0, None, None).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_without_a_compiler_torch_computes(monkeypatch, tmp_path):
    build = partial(compiled.library.__wrapped__, losses_c.SOURCE)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert build() is None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert build() is None
    # A container's user who is not in /etc/passwd has no home.
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)
    assert build() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "OPTIONS", ("--no-such-option",))
    assert build() is None
    assert not list((tmp_path / "megatron_ext").iterdir())
    monkeypatch.setattr(losses_c, "library", lambda source: None)
    student, teacher = logits(64, torch.float32)
    assert native.kernels(student, teacher, 64) is None
    assert row_stats(student, teacher, 1.0, 64, "gap").shape == (5, 7, 3)
