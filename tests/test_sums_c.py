"""Sums over positions in C against the same in torch and in float64, and where they decline."""

import math
from functools import partial

import numpy
import pytest
import torch

from megatron_ext.pruning import native, sums_c
from megatron_ext.pruning.aggregation import OverSamples, sums_over_positions
from megatron_ext.pruning.taps import one_minus_cosine
from megatron_ext.runtime import compiled

pytestmark = pytest.mark.skipif(
    compiled.library(sums_c.SOURCE) is None, reason="there is no C compiler"
)

CHANNELS = 12
KERNELS = {
    "units": native.unit_sums,
    "heads": partial(native.head_sums, channels=CHANNELS),
    "changes": native.change_sums,
}


def activations(positions, batch, width, dtype=torch.float32, seed=0):
    """Return two tensors that resemble each other, [s, B, c], and a mask [s, B]."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, positions, batch, width, generator=generator)
    left_out = torch.rand(positions, batch, generator=generator) < 0.3
    return (x.to(dtype), (x + 0.5 * noise).to(dtype)), left_out


def of_kernel(name, kind, tensors, left_out):
    return KERNELS[name](kind, tensors if name == "changes" else tensors[:1], left_out)


def expected(name, kind, tensors, left_out):
    """Return [B, units], naive in float64."""
    x, y = (each.double().numpy() for each in tensors)
    if name == "changes":
        lengths = numpy.linalg.norm(x, axis=-1) * numpy.linalg.norm(y, axis=-1)
        values = (1 - (x * y).sum(axis=-1) / lengths)[..., None]
    elif name == "heads":
        values = numpy.linalg.norm(x.reshape(*x.shape[:2], -1, CHANNELS), axis=-1)
    else:
        values = x
    if left_out is not None:
        values = values * ~left_out.numpy()[..., None]
    return (numpy.abs(values) if kind == "mean" else values**2).sum(axis=0)


CASES = [(name, kind) for name in ("units", "heads") for kind in ("mean", "l2")]
CASES += [("changes", "mean")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize(
    ("positions", "batch", "width"),
    [(1, 1, 12), (3, 2, 36), (64, 1, 48), (65, 3, 24), (131, 2, 1236), (7, 2, 2400)],
)
def test_sums_are_those_of_float64(positions, batch, width, name, kind, dtype):
    tensors, mask = activations(positions, batch, width, dtype)
    for left_out in (None, mask):
        (sums,) = of_kernel(name, kind, tensors, left_out)
        assert sums.dtype == torch.float64
        reference = expected(name, kind, tensors, left_out)
        numpy.testing.assert_allclose(sums.numpy(), reference, rtol=2e-6, atol=1e-6 * positions)


@pytest.mark.parametrize("kind", ["mean", "l2"])
def test_sums_of_torch_are_the_same(kind):
    tensors, mask = activations(40, 3, 60, torch.bfloat16)
    for left_out in (None, mask):
        sums = of_kernel("units", kind, tensors, left_out)
        in_torch = sums_over_positions(kind, tensors[0], left_out)
        assert (sums.shape, sums.dtype) == (in_torch.shape, in_torch.dtype)
        torch.testing.assert_close(sums, in_torch, rtol=1e-6, atol=0)
    changes = sums_over_positions("mean", one_minus_cosine(*tensors), mask)
    torch.testing.assert_close(
        of_kernel("changes", "mean", tensors, mask), changes, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("name", KERNELS)
def test_long_sequences_lose_no_digits(name):
    """8192 equal positions, whose roundings all go one way; at most 64 are added in float32."""
    row = torch.rand(1, 1, 24, generator=torch.Generator().manual_seed(1)) + 0.1
    tensors = [x.expand(8192, -1, -1).contiguous() for x in (row, row.flip(-1))]
    once = of_kernel(name, "mean", (row, row.flip(-1)), None)
    many = of_kernel(name, "mean", tensors, None)
    torch.testing.assert_close(many, 8192 * once, rtol=64 * 2**-25, atol=0)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_strides_and_threads_change_no_bit(name, kind):
    tensors, mask = activations(70, 3, 2400)
    wider = [torch.cat([x, x], dim=-1).chunk(2, dim=-1)[0] for x in tensors]
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    found = [of_kernel(name, kind, each, mask) for each in (tensors, wider, turned)]
    torch.set_num_threads(3)
    found.append(of_kernel(name, kind, tensors, mask))
    torch.set_num_threads(1)
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("place", [0, 20, 35])
def test_what_is_not_finite_comes_out_unless_it_is_left_out(place, name, kind, bad):
    tensors, _ = activations(9, 2, 36)
    tensors[0][4, 1, place] = bad
    (sums,) = of_kernel(name, kind, tensors, None)
    unit = place // {"units": 1, "heads": CHANNELS, "changes": 36}[name]
    assert not sums[1, unit].isfinite()
    sums[1, unit] = 0
    assert sums.isfinite().all()
    left_out = torch.zeros(9, 2, dtype=torch.bool)
    left_out[4, 1] = True
    assert of_kernel(name, kind, tensors, left_out).isfinite().all()


def test_equal_rows_have_not_changed_and_opposite_ones_by_two():
    (x, _), _ = activations(5, 2, 2400)
    assert not native.change_sums("mean", (x, x.clone()), None).any()
    assert torch.equal(native.change_sums("mean", (x, -x), None)[0], torch.full((2, 1), 10.0))
    zeros = torch.zeros_like(x)
    assert torch.equal(native.change_sums("mean", (x, zeros), None)[0], torch.full((2, 1), 5.0))


@pytest.mark.parametrize("sequence", ["mean", "l2"])
def test_samples_are_added_as_in_torch(sequence, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    sums = torch.rand(1, 3, 7, generator=generator).double()
    positions, weights = (
        torch.tensor([[4.0], [9], [1]]).double(),
        torch.tensor([1.0, 1, 0]).double(),
    )
    both = []
    for decline in (False, True):
        if decline:
            monkeypatch.setattr(native, "add_samples", lambda *args: False)
        both.append(OverSamples(7, sequence, [], "cpu"))
        for _ in range(2):
            both[-1].add(sums.clone(), positions, weights)
    assert both[0].count == both[1].count == 4
    torch.testing.assert_close(both[0].sums, both[1].sums, rtol=1e-14, atol=0)


def test_where_they_decline(monkeypatch):
    (x, y), _ = activations(4, 2, 36)
    assert native.unit_sums("var", (x,), None) is None
    # Regression: an aggregation that the kernels do not know came out as the mean.
    assert native.unit_sums("rms", (x,), None) is None
    totals = torch.zeros(2, 36, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    sums, ones = torch.ones(1, 2, 36, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    assert not native.add_samples(totals, "rms", sums, ones.unsqueeze(-1), ones)
    assert native.change_sums("l2", (x, y), None) is None
    assert native.unit_sums("mean", (x.double(),), None) is None
    assert native.change_sums("mean", (x, y.bfloat16()), None) is None
    assert native.unit_sums("mean", (x.transpose(1, 2),), None) is None
    monkeypatch.setattr(sums_c, "library", lambda source: None)
    sums_c._function.cache_clear()
    assert native.unit_sums("mean", (x,), None) is None
    sums_c._function.cache_clear()
