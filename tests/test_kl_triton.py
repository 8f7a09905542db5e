"""The Triton kernels in Triton's interpreter, which needs no GPU, against the steps in torch."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from megatron_ext.distillation import steps
from tests.programs import ROOT
from tests.test_native import in_torch, logits

pytest.importorskip("triton", exc_type=ImportError)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# dtype, columns, columns of padding, temperature; blocks are of 64 columns.
CASES = list(itertools.product(("fp32", "bf16"), (1, 63, 64, 150), (0, 70), (1.0, 0.3)))
CASES += [("fp16", 150, 70, 0.3)]


def run_kernels(path):
    """Save what the kernels return for every case, and for two equal models."""
    from megatron_ext.distillation import kl_triton

    kl_triton.BLOCK = 64
    found = {}
    for case in CASES:
        dtype, columns, padding, temperature = case
        student, teacher = logits(columns + padding, DTYPES[dtype])
        stats = kl_triton.kl_stats(student, teacher, temperature, columns)
        scale = factors(stats[0]) / temperature
        gradient = kl_triton.kl_gradient(student, teacher, stats[:4], scale, temperature, columns)
        found[case] = stats, gradient
    student, _ = logits(150, torch.float32)
    stats = kl_triton.kl_stats(student, student, 1.0, 150)
    gradient = kl_triton.kl_gradient(student, student, stats[:4], stats[2], 1.0, 150)
    found["equal"] = stats, gradient
    found["rising"] = kl_triton.kl_stats(*rising(), 1.0, 150), None
    torch.save(found, path)


def rising():
    """Return logits whose largest come last, and far above the first."""
    student, teacher = logits(150, torch.float32)
    slope = torch.linspace(-400, 0, 150)
    return student + slope, teacher + slope.flip(-1).cumsum(-1).flip(-1) / 100


def factors(loss):
    return torch.linspace(-1, 2, loss.numel()).view_as(loss)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the results of a process that interprets from its first import of Triton on."""
    path = tmp_path_factory.mktemp("triton") / "found.pt"
    code = f"from tests.test_kl_triton import run_kernels; run_kernels({str(path)!r})"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)
    return torch.load(path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_float64(case, found, monkeypatch):
    in_torch(monkeypatch)
    dtype, columns, padding, temperature = case
    student, teacher = logits(columns + padding, DTYPES[dtype])
    stats, gradient = found[case]
    expected = steps._kl_stats(student, teacher, temperature, columns)
    torch.testing.assert_close(stats, expected, rtol=1e-5, atol=1e-5)
    # In float64: torch's own in float32 are off by more than is allowed here.
    p_s, p_t = ((x[..., :columns].double() / temperature).softmax(-1) for x in (student, teacher))
    scale = factors(stats[0]).unsqueeze(-1) / temperature
    reference = ((p_s - p_t) * scale).to(gradient.dtype)
    rounding = {"bf16": 2**-7, "fp16": 2**-10, "fp32": 1e-5}[dtype]
    torch.testing.assert_close(
        gradient[..., :columns], reference, rtol=rounding, atol=4e-7 / temperature
    )
    assert not gradient[..., columns:].any()


def test_equal_models_give_zero(found):
    stats, gradient = found["equal"]
    assert not stats[4].any()
    assert not gradient.any()


def test_sums_follow_rising_maxima(found):
    student, teacher = (x.double() for x in rising())
    stats, _ = found["rising"]
    highest = student.amax(-1, keepdim=True), teacher.amax(-1, keepdim=True)
    s, t = student - highest[0], teacher - highest[1]
    expected = [*(x.squeeze(-1) for x in highest), s.exp().sum(-1), t.exp().sum(-1)]
    expected.append((t.exp() * (t - s)).sum(-1) / math.log(2))
    torch.testing.assert_close(stats.double(), torch.stack(expected), rtol=2e-6, atol=1e-6)
