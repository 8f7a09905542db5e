"""The losses against float64 autograd: values, gradients, layouts, padding, memory, collectives."""

import functools
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.distillation import chunks, native
from megatron_ext.distillation.losses import (
    LogitLoss,
    vocab_parallel_cosine,
    vocab_parallel_jsd,
    vocab_parallel_kl,
    vocab_parallel_mse,
    vocab_parallel_reverse_kl,
)
from tests.ranks import run_ranks

SHAPES = [(3, 5, 47), (1, 1, 7), (17, 2, 1031)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Kernels decline float64.
WAYS = [(dtype, "torch") for dtype in DTYPES] + [(dtype, "kernels") for dtype in DTYPES[1:]]
# (rtol, atol) against float64 on the same, already rounded logits. bf16 is computed in float32, so
# only its gradient is coarse: one rounding to 8 bits.
VALUE_TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-6, 1e-6),
    torch.bfloat16: (1e-6, 1e-6),
}
VALUE_TOLERANCE[torch.float16] = VALUE_TOLERANCE[torch.bfloat16]
GRAD_TOLERANCE = VALUE_TOLERANCE | {torch.bfloat16: (2**-8, 1e-6), torch.float16: (2**-11, 1e-6)}


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setitem(chunks.CHUNK_ELEMENTS, "cpu", 500)


def _reference_kl(student, teacher, temperature=1.0, vocab_size=None):
    """Every column at once, in float64, left to autograd."""
    s, t = (x.double()[..., :vocab_size] / temperature for x in (student, teacher))
    kl = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True)
    return kl.sum(-1)


def _log_probs(student, teacher, temperature=1.0, vocab_size=None):
    return [
        (x.double()[..., :vocab_size] / temperature).log_softmax(-1) for x in (student, teacher)
    ]


def _reference_reverse_kl(*args, **kwargs):
    s, t = _log_probs(*args, **kwargs)
    return F.kl_div(t, s, reduction="none", log_target=True).sum(-1)


def _reference_jsd(*args, beta=0.5, **kwargs):
    s, t = _log_probs(*args, **kwargs)
    m = (beta * t.exp() + (1 - beta) * s.exp()).log()
    to_m = [F.kl_div(m, x, reduction="none", log_target=True).sum(-1) for x in (t, s)]
    return beta * to_m[0] + (1 - beta) * to_m[1]


def _reference_mse(*args, **kwargs):
    s, t = _log_probs(*args, **kwargs)
    return (s.exp() - t.exp()).square().sum(-1)


def _reference_cosine(*args, **kwargs):
    s, t = _log_probs(*args, **kwargs)
    return 1 - F.cosine_similarity(s.exp(), t.exp(), dim=-1)


JSD = partial(vocab_parallel_jsd, beta=0.3)
LOSSES = {
    "forward-kl": (vocab_parallel_kl, _reference_kl),
    "reverse-kl": (vocab_parallel_reverse_kl, _reference_reverse_kl),
    "jsd": (JSD, partial(_reference_jsd, beta=0.3)),
    "mse": (vocab_parallel_mse, _reference_mse),
    "cosine": (vocab_parallel_cosine, _reference_cosine),
}


def _inputs(shape, dtype, seed=0):
    """Student, teacher [S, B, V] and upstream weights [S, B] of either sign, some zero."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    weights = torch.randn(shape[:2], generator=g, dtype=torch.float64)
    weights[torch.rand(shape[:2], generator=g) < 0.3] = 0  # masked tokens
    return student.to(dtype), teacher.to(dtype), weights.float().double()


def in_torch(patch):
    """Have what follows computed without kernels, as where there is no compiler or Triton."""
    patch.setattr(native, "kernels", lambda *args, **options: None)


def _value_and_grad(loss, student, teacher, weights, **kwargs):
    student = student.detach().requires_grad_()
    value = loss(student, teacher, **kwargs)
    (grad,) = torch.autograd.grad(value, student, weights.to(value.dtype))
    return value.detach(), grad


def _check(got, expected, dtype, *, name="forward-kl"):
    """Compare (value, grad) pairs; assert_close says where they differ and by how much.

    float64 holds all losses to the same digits. In float32 the gradients of the others are
    differences of larger terms: p_s times log ratios of up to 50 here, or of two probabilities
    near 1.
    """
    factor = 1 if name == "forward-kl" or dtype == torch.float64 else 30
    for x, y, tolerance in zip(got, expected, (VALUE_TOLERANCE, GRAD_TOLERANCE), strict=True):
        rtol, atol = tolerance[dtype]
        if factor > 1:  # what tips a rounding to bfloat16 costs twice its error
            rtol = max(2 * rtol, factor * VALUE_TOLERANCE[dtype][0])
        torch.testing.assert_close(x.double(), y.double(), rtol=rtol, atol=factor * atol)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("dtype", "way"), WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64_autograd(shape, dtype, way, temperature, padding, name, monkeypatch):
    if way == "torch":
        in_torch(monkeypatch)
    loss, reference = LOSSES[name]
    student, teacher, weights = _inputs(shape, dtype)
    kwargs = {"temperature": temperature, "vocab_size": shape[-1] - padding}
    value, grad = _value_and_grad(loss, student, teacher, weights, **kwargs)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    expected = _value_and_grad(reference, student, teacher, weights, **kwargs)
    _check((value, grad), expected, dtype, name=name)
    assert grad[weights == 0].eq(0).all()
    assert grad[..., kwargs["vocab_size"] :].eq(0).all()


def test_temperature_has_no_squared_factor():
    """At T = 2 these logits are p_s = (1/2, 1/2) and p_t = (1/4, 3/4)."""
    student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[0.0, 2 * math.log(3)]]])
    p = torch.tensor([0.25, 0.75])
    expected = (p * (p / 0.5).log()).sum()
    value, grad = _value_and_grad(
        vocab_parallel_kl, student, teacher, torch.ones(1, 1), temperature=2.0
    )
    torch.testing.assert_close(value.squeeze(), expected)
    torch.testing.assert_close(grad.squeeze(), (0.5 - p) / 2)


# (name, true vocabulary, padded vocabulary)
LAYOUTS = [
    ("no padding", 1032, 1032),
    ("padding on the last rank", 1031, 1032),
    ("ranks 2 and 3 of 4 hold padding only", 20, 64),
]


def _layout_inputs(vocab, padded, dtype):
    student, teacher, weights = _inputs((17, 2, padded), dtype)
    student[0] *= 1000  # the ranks' maxima are then far apart
    teacher[1] *= 1000
    student[2] -= 5000  # a rank without columns must not offer a larger maximum
    teacher[3] -= 5000
    student[..., vocab:], teacher[..., vocab:] = float("nan"), float("inf")
    return student, teacher, weights


def _on_ranks(temperature, name="forward-kl"):
    """For each layout, dtype and way: this rank's value and gradient."""
    loss, _ = LOSSES[name]
    chunks.CHUNK_ELEMENTS["cpu"] = 500
    group = torch.distributed.group.WORLD
    results = {}
    for layout, vocab, padded in LAYOUTS:
        for dtype, way in WAYS:
            student, teacher, weights = _layout_inputs(vocab, padded, dtype)
            s, t = (
                x.chunk(group.size(), -1)[group.rank()].contiguous() for x in (student, teacher)
            )
            where = {"temperature": temperature, "vocab_size": vocab, "tp_group": group}
            with pytest.MonkeyPatch.context() as patch:
                if way == "torch":
                    in_torch(patch)
                got = _value_and_grad(loss, s, t, weights, **where)
            results[layout, dtype, way] = got
    return results


@functools.cache
def _serial_and_reference(name, temperature, vocab, padded, dtype):
    """Return value and gradient of the loss on one rank, and of its reference."""
    loss, reference = LOSSES[name]
    student, teacher, weights = _layout_inputs(vocab, padded, dtype)
    kwargs = {"temperature": temperature, "vocab_size": vocab}
    serial = _value_and_grad(loss, student, teacher, weights, **kwargs)
    student[..., vocab:] = teacher[..., vocab:] = 0  # the reference's 0 * nan is nan
    return serial, _value_and_grad(reference, student, teacher, weights, **kwargs)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_any_tp_size_equals_serial(name, tp_size, temperature):
    ranks = run_ranks(tp_size, _on_ranks, temperature, name)
    for layout, vocab, padded in LAYOUTS:
        for dtype, way in WAYS:
            values, grads = zip(*(rank[layout, dtype, way] for rank in ranks), strict=True)
            assert all(torch.equal(value, values[0]) for value in values), (layout, dtype)
            got = values[0], torch.cat(grads, -1)
            for expected in _serial_and_reference(name, temperature, vocab, padded, dtype):
                _check(got, expected, dtype, name=name)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_gradient_is_not_multiplied_by_the_tp_size(tp_size):
    """Model Optimizer's bug: autograd through an all-reduce of a replicated loss sums R gradients.

    The loss looks right; the gradient is R times too large, and clipping or a second loss shows it.
    """
    layout, vocab, padded = LAYOUTS[0]
    ranks = run_ranks(tp_size, _on_ranks, 1.0)
    grad = torch.cat([rank[layout, torch.float64, "torch"][1] for rank in ranks], -1)
    _, serial = _value_and_grad(_reference_kl, *_layout_inputs(vocab, padded, torch.float64))
    assert (grad.norm() / serial.norm()).item() == pytest.approx(1, rel=1e-12)


def test_padding_has_no_influence():
    """Whatever the padding holds, and however differently the two models are padded."""
    student, teacher, weights = _inputs((3, 5, 47), torch.float32)
    expected = _value_and_grad(vocab_parallel_kl, student, teacher, weights)
    for fill in (0.0, 1e4, float("inf"), float("-inf"), float("nan")):
        for pad_s, pad_t in ((3, 3), (1, 9), (9, 0)):
            value, grad = _value_and_grad(
                vocab_parallel_kl,
                F.pad(student, (0, pad_s), value=fill),
                F.pad(teacher, (0, pad_t), value=fill),
                weights,
                vocab_size=47,
            )
            assert torch.equal(value, expected[0])
            assert torch.equal(grad[..., :47], expected[1])
            assert grad[..., 47:].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_equal_models_are_zero(name, dtype):
    """Exactly, but for jsd and cosine: the mixture and the norm of a distribution round."""
    student, _, weights = _inputs((17, 2, 1031), dtype)
    value, grad = _value_and_grad(LOSSES[name][0], student, student.clone(), weights)
    rounding = {"jsd": 5e-7, "cosine": 5e-7}.get(name, 0)
    assert value.abs().max() <= rounding
    assert grad.abs().max() <= rounding


@pytest.mark.parametrize("distance", [1e-2, 1e-4])
def test_precision_near_convergence(distance):
    """At 1e-2 KL is 5e-5; naive float32 is off by 1e-6, and by 2e-4 of the gradient's norm."""
    g = torch.Generator().manual_seed(0)
    teacher = 20 + 3 * torch.randn(16, 1, 32000, generator=g)
    student = teacher + distance * torch.randn(teacher.shape, generator=g)
    weights = torch.ones(16, 1)
    value, grad = _value_and_grad(vocab_parallel_kl, student, teacher, weights)
    exact, exact_grad = _value_and_grad(_reference_kl, student.double(), teacher, weights.double())
    assert (value - exact).abs().max() < 5e-7
    assert value.min() >= 0
    assert (grad - exact_grad).norm() / exact_grad.norm() < 5e-7 / distance


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_stay_finite(dtype):
    student, teacher, weights = _inputs((3, 5, 47), dtype)
    student, teacher = 1e4 * student, 1e4 * teacher
    got = _value_and_grad(vocab_parallel_kl, student, teacher, weights)
    assert got[0].isfinite().all()
    _check(got, _value_and_grad(_reference_kl, student, teacher, weights), dtype)


@pytest.mark.parametrize("elements", [1, 5000, 2**19])
def test_chunking_changes_nothing(monkeypatch, elements):
    inputs = _inputs((17, 2, 1031), torch.float64)
    expected = _value_and_grad(vocab_parallel_kl, *inputs)
    monkeypatch.setitem(chunks.CHUNK_ELEMENTS, "cpu", elements)
    _check(_value_and_grad(vocab_parallel_kl, *inputs), expected, torch.float64)


def test_non_contiguous_inputs():
    student, teacher, weights = _inputs((17, 2, 47), torch.float32)
    expected = _value_and_grad(vocab_parallel_kl, student, teacher, weights)
    batch_first = student.transpose(0, 1).contiguous().transpose(0, 1)
    vocab_first = teacher.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    expanded_weights = weights[:, :1].expand(17, 2)
    got = _value_and_grad(vocab_parallel_kl, batch_first, vocab_first, weights)
    _check(got, expected, torch.float32)
    got = _value_and_grad(vocab_parallel_kl, batch_first, vocab_first, expanded_weights)
    _check(got, _value_and_grad(_reference_kl, student, teacher, expanded_weights), torch.float32)


@pytest.mark.parametrize("shape", [(0, 2, 47), (3, 0, 47)])
def test_no_rows(shape):
    value, grad = _value_and_grad(vocab_parallel_kl, *_inputs(shape, torch.float32))
    assert value.shape == shape[:2]
    assert grad.shape == shape


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_student_receives_a_gradient(name):
    loss, _ = LOSSES[name]
    student, teacher, _ = _inputs((3, 5, 47), torch.float32)
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert not loss(student.detach(), teacher).requires_grad


def test_mixed_dtypes(monkeypatch):
    in_torch(monkeypatch)  # kernels in C take one dtype only
    student, teacher, weights = _inputs((3, 5, 47), torch.bfloat16)
    got = _value_and_grad(vocab_parallel_kl, student, teacher.float(), weights)
    expected = _value_and_grad(vocab_parallel_kl, student, teacher, weights)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


class _Allocations(TorchDispatchMode):
    """The (dtype, elements) of every result of an operator that is not a view of ``inputs``."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {x.untyped_storage().data_ptr() for x in inputs}
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.inputs:
                    self.seen.append((x.dtype, storage.nbytes() // x.element_size()))
        return out


def _large_allocations(loss, student, teacher, weights):
    """Dtypes of the tensors made in forward and backward with a quarter of the logits or more."""
    with _Allocations(student, teacher) as allocations:
        _value_and_grad(loss, student, teacher, weights)
    return {dtype for dtype, elements in allocations.seen if elements >= student.numel() / 4}


@pytest.mark.parametrize("name", LOSSES)
def test_no_float32_copy_of_the_logits(name):
    inputs = _inputs((64, 2, 103), torch.bfloat16)
    assert _large_allocations(LOSSES[name][0], *inputs) == {torch.bfloat16}  # the gradient
    assert torch.float64 in _large_allocations(_reference_kl, *inputs)  # the detector detects


def test_logits_are_kept_by_reference():
    student, teacher, _ = _inputs((64, 2, 103), torch.bfloat16)
    student.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        vocab_parallel_kl(student, teacher)
    logits = [x.data_ptr() for x in saved if x.numel() == student.numel()]
    assert logits == [student.data_ptr(), teacher.data_ptr()]
    assert sum(x.numel() for x in saved) == 2 * student.numel() + 4 * 64 * 2


class _Collectives(TorchDispatchMode):
    """The names of the c10d operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _collectives(name):
    loss_of, _ = LOSSES[name]
    group = torch.distributed.group.WORLD
    student, teacher, _ = _inputs((17, 2, 47), torch.float32)
    student.requires_grad_()
    with _Collectives() as control:
        torch.distributed.all_reduce(torch.zeros(1))
    with _Collectives() as forward:
        loss = loss_of(student, teacher, tp_group=group)
    with _Collectives() as backward:
        loss.sum().backward()
    empty = loss_of(student[:0], teacher[:0], tp_group=group)
    return len(control.names), len(forward.names), len(backward.names), list(empty.shape)


@pytest.mark.parametrize("name", LOSSES)
def test_one_collective_in_forward_none_in_backward(name):
    """Two for jsd, whose mixture needs both distributions normalised."""
    number = 2 if name == "jsd" else 1
    assert run_ranks(2, _collectives, name) == [(1, number, 0, [0, 2])] * 2
    assert run_ranks(1, _collectives, name) == [(1, 0, 0, [0, 2])]


@pytest.mark.parametrize("beta", [0.0, 1.0, -1.0])
def test_beta_is_within_0_and_1(beta):
    with pytest.raises(ValueError, match=f"beta must be within 0 and 1, got {beta}"):
        vocab_parallel_jsd(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), beta=beta)


def test_jsd_between_both_kls():
    """Over beta it tends to forward KL for beta -> 0, over 1 - beta to reverse KL for beta -> 1."""
    student, teacher = (x / 10 for x in _inputs((3, 5, 47), torch.float64)[:2])
    for beta, kl in ((1e-6, vocab_parallel_kl), (1 - 1e-6, vocab_parallel_reverse_kl)):
        jsd = vocab_parallel_jsd(student, teacher, beta=beta) / min(beta, 1 - beta)
        torch.testing.assert_close(jsd, kl(student, teacher), rtol=1e-3, atol=0)


def test_a_logit_loss_is_what_its_settings_say():
    student, teacher, _ = _inputs((3, 5, 47), torch.float64)
    for name, (loss, _) in LOSSES.items():
        setting = LogitLoss(kind=name, temperature=2.0, beta=0.3)
        expected = loss(student, teacher, temperature=2.0, vocab_size=40)
        assert torch.equal(setting(student, teacher, vocab_size=40), expected)
        squared = replace(setting, temperature_squared=True)
        assert torch.equal(squared(student, teacher, vocab_size=40), 4 * expected)


FOUR_RANKS = SimpleNamespace(size=lambda: 4, rank=lambda: 0)


@pytest.mark.parametrize(
    ("student", "teacher", "kwargs", "message"),
    [
        ((3, 5, 8), (3, 4, 8), {}, r"\[3, 5, 8\].*\[3, 4, 8\]"),
        ((3, 5, 8), (3, 5, 9), {}, "8 columns.* 9: give vocab_size"),
        ((3, 5, 8), (3, 5, 9), {"vocab_size": 20, "tp_group": FOUR_RANKS}, "8 col.* 9: .*4 tensor"),
        ((3, 5, 8), (3, 5, 8), {"vocab_size": 9}, "vocab_size 9 .* 8"),
        ((3, 5, 8), (3, 5, 8), {"vocab_size": 0}, "vocab_size 0"),
        ((3, 5, 8), (3, 5, 8), {"vocab_size": 33, "tp_group": FOUR_RANKS}, "vocab_size 33 .* 32"),
        ((3, 5, 0), (3, 5, 0), {}, "vocab_size 0"),
        ((3, 5, 8), (3, 5, 8), {"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ((3, 5, 8), (3, 5, 8), {"temperature": float("nan")}, "temperature .* nan"),
    ],
)
def test_errors_name_the_values(student, teacher, kwargs, message):
    with pytest.raises(ValueError, match=message):
        vocab_parallel_kl(torch.zeros(student), torch.zeros(teacher), **kwargs)
