"""Sums over positions in Triton, in its interpreter, and compiled for a GPU.

The cases and what is expected are those of ``test_sums_c``; the variance is one more.
"""

from functools import partial

import numpy
import pytest
import torch

from megatron_ext.pruning.aggregation import OverSamples, sums_over_positions
from megatron_ext.pruning.taps import one_minus_cosine
from tests import test_sums_c
from tests.test_sums_c import CHANNELS, activations, expected

pytest.importorskip("triton", exc_type=ImportError)

# Positions, samples, channels: fewer and more than programs take, which are made small here.
SHAPES = [(1, 1, 12), (3, 2, 36), (19, 2, 24)]
PROGRAM = {"POSITIONS": 8, "BLOCK": 16, "HEADS_BLOCK": 32}
CASES = [*test_sums_c.CASES, ("units", "var"), ("heads", "var")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLES = {"mean": 1, "l2": 1, "var": 2}


def run_kernels(path):
    """Save what the kernels return for every case; run where Triton is an interpreter."""
    from megatron_ext.pruning import sums_triton

    for size, value in PROGRAM.items():
        setattr(sums_triton, size, value)
    kernels = {
        "units": sums_triton.unit_sums,
        "heads": partial(sums_triton.head_sums, channels=CHANNELS),
        "changes": sums_triton.change_sums,
    }
    found = {}
    for name, kind in CASES:
        for shape in SHAPES:
            for dtype in DTYPES:
                tensors, mask = activations(*shape, DTYPES[dtype])
                tensors = tensors if name == "changes" else tensors[:1]
                for is_masked in (False, True):
                    case = name, kind, shape, dtype, is_masked
                    found[case] = kernels[name](kind, tensors, mask if is_masked else None)
    (x, y), mask = activations(9, 2, 36)
    # [s, B, c] whose rows lie apart, and whose samples lie one behind the other.
    wide = torch.cat([x, x], dim=-1).chunk(2, dim=-1)[0]
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    found["strides"] = [sums_triton.unit_sums("mean", (each,), mask) for each in (x, wide, turned)]
    x[4, 1] = torch.nan
    for name, tensors in (("units", (x,)), ("heads", (x,)), ("changes", (x, y))):
        found["nan", name] = kernels[name]("mean", tensors, None)
        left_out = torch.zeros(9, 2, dtype=torch.bool)
        left_out[4, 1] = True
        found["nan left out", name] = kernels[name]("mean", tensors, left_out)
    (x, _), _ = activations(5, 2, 240)
    found["equal"] = sums_triton.change_sums("mean", (x, x.clone()), None)
    found["opposite"] = sums_triton.change_sums("mean", (x, -x), None)
    found["far from zero"] = sums_triton.unit_sums("var", (x + 1000,), None)
    for kind in SAMPLES:
        totals = torch.zeros(2, 7, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for _ in range(2):
            assert sums_triton.add_samples(totals, kind, *samples(kind))
        found["samples", kind] = totals
    found["declined"] = [
        sums_triton.unit_sums("mean", (x.double(),), None),
        sums_triton.unit_sums("rms", (x,), None),
        sums_triton.unit_sums("mean", (x.transpose(1, 2),), None),
        sums_triton.change_sums("l2", (x, x), None),
        sums_triton.change_sums("mean", (x, x.bfloat16()), None),
    ]
    torch.save(found, path)


def samples(kind):
    """Return sums [K, B, c] of one micro-batch, its positions and weights."""
    generator = torch.Generator().manual_seed(2)
    values = torch.rand(4, 3, 7, generator=generator)
    sums = sums_over_positions(kind, values, None)
    positions = torch.tensor([[4.0], [4], [4]]).double()
    return sums, positions, torch.tensor([1.0, 1, 0]).double()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    from tests.test_losses_triton import interpreted

    return interpreted(__name__, tmp_path_factory.mktemp("sums") / "found.pt")


def reference(name, kind, tensors, left_out):
    """Return [K, B, units] in float64."""
    if kind != "var":
        return expected(name, kind, tensors, left_out)[None]
    x = tensors[0].double()
    if name == "heads":
        x = torch.linalg.vector_norm(x.unflatten(-1, (-1, CHANNELS)), dim=-1)
    x = x if left_out is None else x * ~left_out.unsqueeze(-1)
    return torch.stack([x.sum(dim=0), x.square().sum(dim=0)]).numpy()


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_sums_are_those_of_float64(found, name, kind, shape, dtype, is_masked):
    tensors, mask = activations(*shape, DTYPES[dtype])
    sums = found[name, kind, shape, dtype, is_masked]
    assert sums.dtype == torch.float64
    wanted = reference(name, kind, tensors, mask if is_masked else None)
    numpy.testing.assert_allclose(sums.numpy(), wanted, rtol=2e-6, atol=1e-6 * shape[0])


def test_strides_change_no_bit(found):
    assert all(torch.equal(each, found["strides"][0]) for each in found["strides"])


@pytest.mark.parametrize("name", ["units", "heads", "changes"])
def test_what_is_not_a_number_comes_out_unless_it_is_left_out(found, name):
    (sums,) = found["nan", name]
    assert sums[0].isfinite().all()
    assert not sums[1].isfinite().any()
    assert found["nan left out", name].isfinite().all()


def test_equal_rows_have_not_changed_and_opposite_ones_by_two(found):
    assert not found["equal"].any()
    assert torch.equal(found["opposite"][0], torch.full((2, 1), 10.0).double())


def test_a_variance_small_beside_the_squared_mean_is_kept(found):
    """Sums of plain squares in float32 would leave two digits of it."""
    (x, _), _ = activations(5, 2, 240)
    first, second = found["far from zero"] / 5
    variance = (x.double() + 1000).float().double().var(dim=0, correction=0)
    torch.testing.assert_close(second - first.square(), variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SAMPLES)
def test_samples_are_added_as_in_torch(found, kind, monkeypatch):
    monkeypatch.setenv("MEGATRON_EXT_NATIVE", "0")
    monkeypatch.setattr("megatron_ext.pruning.native._module", lambda device_type: None)
    over = OverSamples(7, kind, [], "cpu")
    for _ in range(2):
        over.add(*samples(kind))
    sums, count = found["samples", kind]
    assert count == over.count == 4
    torch.testing.assert_close(sums, over.sums, rtol=1e-12, atol=1e-15)


def test_where_they_decline(found):
    assert found["declined"] == [None] * 5


KERNELS = [
    *(("_unit_kernel", {"masked": m, "kind": k, "block": 512}) for m in (0, 1) for k in range(3)),
    ("_head_kernel", {"masked": 1, "kind": 2, "block": 16, "width": 128}),
    ("_change_kernel", {"masked": 1, "block": 1024}),
    *(("_samples_kernel", {"kind": k, "block": 512}) for k in range(3)),
]


@pytest.mark.parametrize(("name", "choice"), KERNELS, ids=str)
def test_kernels_compile_for_a_gpu(name, choice, monkeypatch, tmp_path):
    from megatron_ext.pruning import sums_triton
    from tests.test_losses_triton import compile_for_gpu

    if "masked" in choice and name != "_change_kernel":
        choice = choice | {"span": sums_triton.POSITIONS}
    types = dict.fromkeys(("x", "y"), "*bf16") | {"left_out": "*u8", "out": "*fp64"}
    samples = ("sums", "num_positions", "weights", "totals", "total_weight")
    types |= dict.fromkeys(samples, "*fp64")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compile_for_gpu(getattr(sums_triton, name), types, choice, num_warps=4)


def test_one_minus_cosine_is_the_same(found):
    shape = SHAPES[-1]
    tensors, mask = activations(*shape)
    changes = sums_over_positions("mean", one_minus_cosine(*tensors), mask)
    sums = found["changes", "mean", shape, "fp32", True]
    torch.testing.assert_close(sums, changes, rtol=1e-5, atol=0)
