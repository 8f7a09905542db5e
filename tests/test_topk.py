"""Forward KL over the teacher's likeliest tokens against float64 autograd, on 1, 2 and 4 ranks."""

import pytest
import torch

from megatron_ext.distillation import chunks
from megatron_ext.distillation.losses import LogitLoss, vocab_parallel_kl
from megatron_ext.distillation.topk import DROP, TAIL, TopK, teacher_top_k, vocab_parallel_top_k_kl
from tests.ranks import run_ranks

# (vocabulary, padded vocabulary, K)
CASES = [(47, 48, 1), (47, 48, 9), (20, 64, 13), (1031, 1032, 100), (47, 48, 47)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# float64 logits are ranked in float32 but computed in float64; tails are 1 - sum, so that a small
# one has few digits in float32.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-6, torch.bfloat16: 5e-6}
GRAD_RTOL = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setitem(chunks.CHUNK_ELEMENTS, "cpu", 500)


def inputs(padded, dtype):
    g = torch.Generator().manual_seed(padded)
    student, teacher = (2 * torch.randn(5, 3, padded, generator=g) for _ in range(2))
    weights = torch.randn(5, 3, generator=g)
    weights[1] = 0
    return student.to(dtype), teacher.to(dtype), weights


def reference(student, teacher, vocab_size, top_k, rest, temperature):
    """Every token at once, ties by the lowest token through a stable sort."""
    s, t = (x.double()[..., :vocab_size] / temperature for x in (student, teacher))
    chosen = t.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    if rest == DROP:
        s, t = (x.gather(-1, chosen).log_softmax(-1) for x in (s, t))
        return (t.exp() * (t - s)).sum(-1)
    s, t = s.log_softmax(-1), t.log_softmax(-1)
    others = torch.ones_like(t).scatter(-1, chosen, 0.0) > 0
    in_top = (t.exp() * (t - s)).masked_fill(others, 0).sum(-1)
    if top_k == vocab_size:
        return in_top
    mass_s, mass_t = (x.masked_fill(~others, -torch.inf).logsumexp(-1) for x in (s, t))
    return in_top + mass_t.exp() * (mass_t - mass_s)


def value_and_grad(loss, student, weights):
    student = student.detach().requires_grad_()
    value = loss(student)
    (grad,) = torch.autograd.grad(value, student, weights.to(value.dtype))
    return value.detach(), grad


def on_ranks(temperature):
    chunks.CHUNK_ELEMENTS["cpu"] = 500
    group = torch.distributed.group.WORLD
    results = {}
    for vocab, padded, top_k in CASES:
        for dtype in DTYPES:
            student, teacher, weights = inputs(padded, dtype)
            student[..., vocab:], teacher[..., vocab:] = float("nan"), float("inf")
            s, t = (x.chunk(group.size(), -1)[group.rank()] for x in (student, teacher))
            for rest in (DROP, TAIL):
                loss = LogitLoss(temperature=temperature, top_k=top_k, top_k_rest=rest)
                results[vocab, top_k, dtype, rest] = value_and_grad(
                    lambda x, t=t, loss=loss, v=vocab: loss(x, t, vocab_size=v, tp_group=group),
                    s,
                    weights,
                )
    return results


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_equals_float64_autograd(tp_size, temperature):
    ranks = run_ranks(tp_size, on_ranks, temperature)
    for vocab, padded, top_k in CASES:
        for dtype in DTYPES:
            student, teacher, weights = inputs(padded, dtype)
            for rest in (DROP, TAIL):
                name = (vocab, top_k, dtype, rest)
                values, grads = zip(*(rank[name] for rank in ranks), strict=True)
                assert all(torch.equal(value, values[0]) for value in values), name
                grad = torch.cat(grads, dim=-1)
                settings = (teacher, vocab, top_k, rest, temperature)
                expected, expected_grad = value_and_grad(
                    lambda x, settings=settings: reference(x, *settings), student.double(), weights
                )
                torch.testing.assert_close(
                    values[0].double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
                )
                torch.testing.assert_close(
                    grad.double(), expected_grad, rtol=GRAD_RTOL[dtype], atol=TOLERANCE[dtype]
                )
                assert grad.dtype == dtype
                assert grad[..., vocab:].eq(0).all()


def test_all_tokens_are_plain_kl():
    student, teacher, _ = inputs(48, torch.float64)
    expected = vocab_parallel_kl(student, teacher)
    for rest in (DROP, TAIL):
        loss = LogitLoss(top_k=48, top_k_rest=rest)(student, teacher)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def ties_on_ranks():
    group = torch.distributed.group.WORLD
    logits = torch.tensor([1.0, 3, -0.0, 3, 0, 3, 3, 0]).view(1, 1, -1)
    own = logits.chunk(group.size(), -1)[group.rank()]
    return teacher_top_k(own, 6, tp_group=group)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_of_equal_logits_the_lower_token_comes_first(tp_size):
    for top in run_ranks(tp_size, ties_on_ranks):
        assert top.tokens.tolist() == [[[1, 3, 5, 6, 0, 2]]]
        assert top.log_probs.exp().sum() < 1


def test_equal_models_are_zero_and_the_teacher_gets_no_gradient():
    student, _, weights = inputs(48, torch.float32)
    for rest in (DROP, TAIL):
        loss = LogitLoss(top_k=9, top_k_rest=rest)
        teacher = student.clone().requires_grad_()
        value, grad = value_and_grad(lambda x, t=teacher, f=loss: f(x, t), student, weights)
        assert value.abs().max() < 1e-6
        assert grad.abs().max() < 1e-6
        assert teacher.grad is None


@pytest.mark.parametrize("top_k", [0, 49])
def test_more_than_the_vocabulary_is_refused(top_k):
    student, teacher, _ = inputs(64, torch.float32)
    with pytest.raises(ValueError, match=f"within 1 and the vocabulary, 48: {top_k}"):
        LogitLoss(top_k=top_k)(student, teacher, vocab_size=48)


def test_bad_settings_are_refused():
    student, teacher, _ = inputs(48, torch.float32)
    top = teacher_top_k(teacher, 3)
    assert isinstance(top, TopK)
    with pytest.raises(ValueError, match="rest must be one of"):
        vocab_parallel_top_k_kl(student, top, rest="keep")
    with pytest.raises(ValueError, match="temperature must be > 0"):
        vocab_parallel_top_k_kl(student, top, temperature=0.0)
