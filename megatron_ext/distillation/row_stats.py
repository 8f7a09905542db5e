"""Statistics of rows of logits: on this rank, and of all ranks together.

Shape letters are those of ``chunks``, names of statistics those of ``native``.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ext.distillation import native
from megatron_ext.distillation.chunks import (
    LOG2_E,
    center_,
    chunks,
    compute_dtype,
    gather_ranks,
    weighted_,
)


def row_stats(
    student: Tensor, teacher: Tensor, temperature: float, columns: int, moments: str = "none"
) -> Tensor:
    """Return this rank's [4 + m, S, B], float32 or float64, as ``native`` describes them.

    Centred on the rank's maxima: a product with the raw logits would lose to rounding what the
    difference of two similar models is made of.
    """
    kernels = native.kernels(student, teacher, columns)
    if kernels is not None:
        return kernels.row_stats(student, teacher, temperature, columns, moments)
    shape = (4 + native.MOMENTS[moments], *student.shape[:-1])
    stats = student.new_zeros(shape, dtype=compute_dtype(student, teacher))
    # For a rank that holds only padding: loses every max, and stays finite in the arithmetic.
    stats[:2] = torch.finfo(torch.float32).min
    for positions, s, t in chunks(student, teacher, columns):
        for number, x in enumerate((s, t)):
            torch.amax(x, -1, out=stats[number, positions])
            center_(x, stats[number, positions], temperature)
        gap = t - s if moments == "gap" else None
        for number, x in enumerate((s, t)):
            torch.sum(x.exp2_(), -1, out=stats[2 + number, positions])
        if moments == "gap":
            torch.sum(weighted_(t, gap), -1, out=stats[4, positions])
        if moments == "products":
            for number, (x, y) in enumerate(((s, s), (t, t), (s, t)), 4):
                torch.sum(x * y, -1, out=stats[number, positions])
    return stats


def gathered_stats(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    columns: int,
    tp_group: ProcessGroup | None,
    moments: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what all ranks know of their rows. One all-gather of 4 + m floats per token.

    Returns:
        [4, S, B], the whole rows' maxima and sums of exponentials of both models; [R, 2, S, B], how
        far the ranks' maxima lie below them, in bits; [R, 4 + m, S, B], the ranks' statistics. All
        float64: in float32 the logarithms would cost half of KL's digits.
    """
    stats = row_stats(student, teacher, temperature, columns, moments)
    stats = gather_ranks(stats, tp_group).double()
    row_max = stats[:, :2].amax(0)
    offset = (stats[:, :2] - row_max) * (LOG2_E / temperature)
    row_sum = (offset.exp2() * stats[:, 2:4]).sum(0)
    return torch.cat([row_max, row_sum]), offset, stats
