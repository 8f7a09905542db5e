"""Logits that are not finite give the exact loss or one that is not finite, never a smaller one."""

import math

import pytest
import torch

from megatron_ext.distillation.losses import LogitLoss
from tests.ranks import run_ranks
from tests.test_losses import in_torch

COLUMNS = 40
LOSSES = {
    **{kind: {"kind": kind} for kind in ("forward-kl", "reverse-kl", "jsd", "mse", "cosine")},
    "top-K": {"top_k": 7},
    "top-K, tail": {"top_k": 7, "top_k_rest": "tail"},
    "top-K, all": {"top_k": COLUMNS, "top_k_rest": "tail"},
}
# The last columns are what is left of a vector in C, the first ones fill it up.
HUGE = 1e30  # what stands for an infinite loss where ranks exchange finite numbers
PLACES = (0, 20, COLUMNS - 1)


def kl(p, q):
    """Return the exact divergence of float64 probabilities: 0 log 0 = 0, even over 0."""
    return torch.where(p == 0, 0, p * (p.log() - q.log())).sum(-1)


def exact(name, student, teacher):
    s, t = (x.double().softmax(-1) for x in (student, teacher))
    m = (s + t) / 2
    if name.startswith("top-K"):
        chosen = teacher.sort(dim=-1, descending=True, stable=True).indices
        chosen = chosen[..., : LOSSES[name]["top_k"]]
        if name != "top-K, tail":
            return kl(*(x.double().gather(-1, chosen).softmax(-1) for x in (teacher, student)))
        top_s, top_t = s.gather(-1, chosen), t.gather(-1, chosen)
        return kl(*(torch.cat([x, 1 - x.sum(-1, True)], -1) for x in (top_t, top_s)))
    return {
        "forward-kl": lambda: kl(t, s),
        "reverse-kl": lambda: kl(s, t),
        "jsd": lambda: (kl(t, m) + kl(s, m)) / 2,
        "mse": lambda: (s - t).square().sum(-1),
        "cosine": lambda: 1 - torch.cosine_similarity(s, t, dim=-1),
    }[name]()


def broken(whose, value, place):
    """Return student and teacher [1, 1, 40] with one value in one of them, or in both."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = 2 * torch.randn(2, 1, 1, COLUMNS, generator=generator)
    for name, x in (("student", student), ("teacher", teacher)):
        if whose in (name, "both"):
            x[..., place] = value
    return student, teacher


def cases():
    for whose in ("student", "teacher", "both"):
        for value in (math.nan, -math.nan, math.inf, -math.inf):
            for place in PLACES:
                yield whose, value, place


def losses_on_a_rank(name):
    """Return the loss of every case, computed by this rank with the others."""
    group = torch.distributed.group.WORLD
    loss, found = LogitLoss(**LOSSES[name]), []
    for case in cases():
        s, t = (x.chunk(group.size(), -1)[group.rank()].contiguous() for x in broken(*case))
        found.append(loss(s, t, tp_group=group).item())
    return found


def check(name, found):
    for case, value in zip(cases(), found, strict=True):
        expected = exact(name, *broken(*case)).item()
        if abs(value) < HUGE:
            assert value == pytest.approx(expected, rel=1e-5, abs=1e-6), (case, value)
        if case[:2] == ("teacher", -math.inf) and math.isfinite(expected):
            assert math.isfinite(value), (case, expected)


@pytest.mark.parametrize("way", ["torch", "kernels"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_broken_number_is_no_better_loss(name, way, monkeypatch):
    """Regression: NaN with top-K, and -inf in C, were losses of 0."""
    if way == "torch":
        in_torch(monkeypatch)
    loss = LogitLoss(**LOSSES[name])
    check(name, [loss(*broken(*case)).item() for case in cases()])


@pytest.mark.parametrize("name", LOSSES)
def test_nor_over_ranks(name):
    first, second = run_ranks(2, losses_on_a_rank, name)
    assert str(first) == str(second)
    check(name, first)
