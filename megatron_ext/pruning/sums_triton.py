"""Sums over positions in Triton, on CUDA; see ``native``.

Shape letters are those of ``aggregation``; K is 1, or 2 for var. A program has some units of one
sample and ``POSITIONS`` positions in their order. It adds them in float32, and its sums to those of
other programs in float64, always in the same order: equal activations give equal bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = {"mean": 0, "l2": 1, "var": 2}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POSITIONS = 32  # that are added in float32
UNROLLED = tl.constexpr(4)  # positions whose loads are under way at a time
BLOCK = 512  # units of a program
HEADS_BLOCK = 512  # channels of a program


@triton.jit
def _reach(left_out, s, positions, batch, b, units, masked: tl.constexpr):
    """Return how many units position ``s`` has: all, or none where it takes no part."""
    reach = tl.where(s < positions, units, 0)
    if masked:
        is_out = tl.load(left_out + tl.minimum(s, positions - 1) * batch + b)
        reach = tl.where(is_out == 0, reach, 0)
    return reach


@triton.jit
def _add(first, second, centre, count, value, counts, kind: tl.constexpr):
    """Add the value of one position to ``first``: |x|, x^2, or x - centre and its square.

    The variance is centred on the first position: sums of plain squares would lose one that is
    small beside the squared mean.
    """
    if kind == 0:
        first += tl.abs(value)
    if kind == 1:
        first += value * value
    if kind == 2:
        centre = tl.where(counts & (count == 0), value, centre)
        gap = tl.where(counts, value - centre, 0.0)
        first += gap
        second += gap * gap
        count += counts.to(tl.int32)
    return first, second, centre, count


@triton.jit
def _store(out, step, first, second, centre, count, is_real, kind: tl.constexpr):
    """Write the sums of x, and for var those of x^2 ``step`` numbers behind, without the centre."""
    first, centre = first.to(tl.float64), centre.to(tl.float64)
    if kind == 2:
        squares = second.to(tl.float64) + centre * (2 * first + count * centre)
        tl.store(out + step, squares, mask=is_real)
        first += count * centre
    tl.store(out, first, mask=is_real)


@triton.jit
def _unit_kernel(
    x,
    left_out,
    out,
    positions,
    batch,
    units,
    stride_s,
    stride_b,
    masked: tl.constexpr,
    kind: tl.constexpr,
    span: tl.constexpr,
    block: tl.constexpr,
):
    part, b = tl.program_id(1), tl.program_id(2)
    columns = tl.program_id(0) * block + tl.arange(0, block)
    is_real = columns < units
    first = tl.zeros([block], tl.float32)
    second, centre, count = first, first, tl.zeros([block], tl.int32)
    for begin in range(part * span, tl.minimum((part + 1) * span, positions), UNROLLED):
        for i in tl.static_range(UNROLLED):
            s = begin + i
            reach = _reach(left_out, s, positions, batch, b, units, masked)
            row = x + s.to(tl.int64) * stride_s + b.to(tl.int64) * stride_b
            counts = columns < reach
            value = tl.load(row + columns, mask=counts, other=0.0).to(tl.float32)
            first, second, centre, count = _add(first, second, centre, count, value, counts, kind)
    address = out + (part * batch + b).to(tl.int64) * units + columns
    step = tl.num_programs(1).to(tl.int64) * batch * units
    _store(address, step, first, second, centre, count, is_real, kind)


@triton.jit
def _head_kernel(
    x,
    left_out,
    out,
    positions,
    batch,
    units,
    stride_s,
    stride_b,
    channels,
    masked: tl.constexpr,
    kind: tl.constexpr,
    span: tl.constexpr,
    block: tl.constexpr,
    width: tl.constexpr,
):
    part, b = tl.program_id(1), tl.program_id(2)
    heads, channel = tl.program_id(0) * block + tl.arange(0, block), tl.arange(0, width)
    is_real = heads < units
    columns = heads[:, None] * channels + channel[None, :]
    first = tl.zeros([block], tl.float32)
    second, centre, count = first, first, tl.zeros([block], tl.int32)
    for begin in range(part * span, tl.minimum((part + 1) * span, positions), UNROLLED):
        for i in tl.static_range(UNROLLED):
            s = begin + i
            reach = _reach(left_out, s, positions, batch, b, units, masked)
            row = x + s.to(tl.int64) * stride_s + b.to(tl.int64) * stride_b
            counts = heads < reach
            inside = counts[:, None] & (channel < channels)[None, :]
            value = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
            norm = tl.sqrt(tl.sum(value * value, 1))
            first, second, centre, count = _add(first, second, centre, count, norm, counts, kind)
    address = out + (part * batch + b).to(tl.int64) * units + heads
    step = tl.num_programs(1).to(tl.int64) * batch * units
    _store(address, step, first, second, centre, count, is_real, kind)


@triton.jit
def _change_kernel(
    x,
    y,
    left_out,
    out,
    batch,
    width,
    x_stride_s,
    x_stride_b,
    y_stride_s,
    y_stride_b,
    masked: tl.constexpr,
    block: tl.constexpr,
):
    s, b = tl.program_id(0), tl.program_id(1)
    before = x + s.to(tl.int64) * x_stride_s + b.to(tl.int64) * x_stride_b
    after = y + s.to(tl.int64) * y_stride_s + b.to(tl.int64) * y_stride_b
    lane = tl.arange(0, block)
    reach = width
    if masked:
        reach = tl.where(tl.load(left_out + s * batch + b) == 0, width, 0)
    xx = tl.zeros([block], tl.float32)
    yy = tl.zeros([block], tl.float32)
    xy = tl.zeros([block], tl.float32)
    for start in range(0, width, block):
        inside = start + lane < reach
        u = tl.load(before + start + lane, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(after + start + lane, mask=inside, other=0.0).to(tl.float32)
        xx += u * u
        yy += v * v
        xy += u * v
    # The root is exactly the sum of x^2 of two equal rows.
    squares = tl.sum(xx.to(tl.float64), 0) * tl.sum(yy.to(tl.float64), 0)
    lengths = tl.sqrt(squares)
    change = 1 - tl.sum(xy.to(tl.float64), 0) / tl.where(lengths < 1e-12, 1e-12, lengths)
    change = tl.where(change < 0, 0.0, tl.where(change > 2, 2.0, change))  # NaN is neither
    if masked:
        change = tl.where(tl.load(left_out + s * batch + b) == 0, change, 0.0)
    tl.store(out + s * batch + b, change)


@triton.jit
def _samples_kernel(
    sums,
    num_positions,
    weights,
    totals,
    total_weight,
    batch,
    units,
    kind: tl.constexpr,
    block: tl.constexpr,
):
    columns = tl.program_id(0) * block + tl.arange(0, block)
    is_real = columns < units
    first = tl.load(totals + columns, mask=is_real)
    second = tl.load(totals + units + columns, mask=is_real)
    weight = tl.full([], 0.0, tl.float64)
    for b in range(batch):
        w, n = tl.load(weights + b), tl.load(num_positions + b)
        value = tl.load(sums + b * units + columns, mask=is_real)
        value = tl.sqrt(value) if kind == 1 else value / n
        if kind == 2:
            square = tl.load(sums + (batch + b) * units + columns, mask=is_real) / n
            value = square - value * value
            value = tl.where(value < 0, 0.0, value)
        first += w * value
        second += w * value * value
        weight += w
    tl.store(totals + columns, first, mask=is_real)
    tl.store(totals + units + columns, second, mask=is_real)
    if tl.program_id(0) == 0:
        tl.store(total_weight, tl.load(total_weight) + weight)


def unit_sums(kind: str, tensors: Sequence[Tensor], left_out: Tensor | None) -> Tensor | None:
    """Return [K, B, c] float64 of [s, B, c], see ``native``."""
    units = tensors[0].size(2)
    return _sums(_unit_kernel, kind, tensors, left_out, units, {"block": BLOCK}, num_warps=2)


def head_sums(
    kind: str, tensors: Sequence[Tensor], left_out: Tensor | None, *, channels: int
) -> Tensor | None:
    """Return [K, B, c] float64 of [s, B, c * D], see ``native``."""
    width = triton.next_power_of_2(channels)
    blocks = {"block": max(1, HEADS_BLOCK // width), "width": width}
    heads = tensors[0].size(2) // channels
    return _sums(_head_kernel, kind, tensors, left_out, heads, blocks, channels, num_warps=2)


def _sums(
    kernel,
    kind: str,
    tensors: Sequence[Tensor],
    left_out: Tensor | None,
    units: int,
    blocks: dict[str, int],
    *sizes: int,
    num_warps: int,
) -> Tensor | None:
    """Run a kernel whose programs are for units, positions and samples; add up over positions."""
    (x,) = tensors
    if kind not in KINDS or not _takes(tensors):
        return None
    positions, batch, _ = x.shape
    parts = triton.cdiv(positions, POSITIONS)
    shape = (2 if kind == "var" else 1, parts, batch, units)
    out = torch.empty(shape, dtype=torch.float64, device=x.device)
    kernel[(triton.cdiv(units, blocks["block"]), parts, batch)](
        x,
        x if left_out is None else left_out.view(torch.uint8),
        out,
        positions,
        batch,
        units,
        *x.stride()[:2],
        *sizes,
        masked=left_out is not None,
        kind=KINDS[kind],
        span=POSITIONS,
        **blocks,
        num_warps=num_warps,
    )
    return out.sum(dim=1)


def change_sums(kind: str, tensors: Sequence[Tensor], left_out: Tensor | None) -> Tensor | None:
    """Return [1, B, 1] float64 of two [s, B, H], see ``native``."""
    if kind != "mean" or not _takes(tensors):
        return None
    x, y = tensors
    positions, batch, width = x.shape
    out = torch.empty(positions, batch, dtype=torch.float64, device=x.device)
    _change_kernel[(positions, batch)](
        x,
        y,
        x if left_out is None else left_out.view(torch.uint8),
        out,
        batch,
        width,
        *x.stride()[:2],
        *y.stride()[:2],
        masked=left_out is not None,
        block=min(1024, triton.next_power_of_2(width)),
    )
    return out.sum(dim=0)[None, :, None]


def _takes(tensors: Sequence[Tensor]) -> bool:
    """Whether there are kernels for these tensors."""
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(x.dtype == dtype and x.stride(2) == 1 for x in tensors)


def add_samples(
    totals: tuple[Tensor, Tensor], kind: str, sums: Tensor, num_positions: Tensor, weights: Tensor
) -> bool:
    """Add a micro-batch to the totals over samples, see ``native``."""
    if kind not in KINDS:
        return False
    batch, units = sums.shape[1:]
    inputs = [x.contiguous() for x in (sums, num_positions, weights)]
    grid = (triton.cdiv(units, BLOCK),)
    _samples_kernel[grid](*inputs, *totals, batch, units, kind=KINDS[kind], block=BLOCK)
    return True
