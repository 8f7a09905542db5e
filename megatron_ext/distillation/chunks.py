"""Vocabulary-parallel logits in chunks of positions, and what a loss needs of them row by row.

Shape letters in this package:
    S  sequence positions on this rank      v  padded vocabulary / R, the columns this rank holds
    B  micro-batch                          c  columns of this rank that are real vocabulary
    R  tensor-parallel ranks                n  positions of a chunk

Losses work on logits centred on their rows' maxima, times log2(e) / T: bits, because exp2 is 4
times as fast as exp (torch 2.13 with MKL, one Zen 4 core).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# Elements of one chunk buffer, of which three are alive. On a CPU they should stay in cache
# (16 rows of 32k columns); on a GPU a kernel should outlast its launch.
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}

LOG2_E = 1 / math.log(2)


def real_columns(
    student: Tensor, teacher: Tensor, vocab_size: int | None, tp_group: ProcessGroup | None
) -> int:
    """Return c, the leading columns of this rank that are vocabulary, after checking the shapes."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} "
            "differ in more than the vocabulary."
        )
    tp_size, tp_rank = (tp_group.size(), tp_group.rank()) if tp_group is not None else (1, 0)
    v_s, v_t = student.size(-1), teacher.size(-1)
    if v_s != v_t and (tp_size > 1 or vocab_size is None):
        fix = (
            f"with {tp_size} tensor-parallel ranks a rank then holds other columns of each; pad "
            "both vocabularies alike (--make-vocab-size-divisible-by)"
            if tp_size > 1
            else "give vocab_size, the vocabulary before padding"
        )
        raise ValueError(f"student logits have {v_s} columns, teacher logits {v_t}: {fix}.")
    width = min(v_s, v_t)
    if vocab_size is None:
        vocab_size = width * tp_size
    if not 0 < vocab_size <= width * tp_size:
        raise ValueError(
            f"vocab_size {vocab_size} must be within 1 and {width * tp_size}, "
            f"the padded vocabulary ({width} columns x {tp_size} tensor-parallel ranks)."
        )
    return min(max(vocab_size - tp_rank * width, 0), width)


def chunks(
    student: Tensor, teacher: Tensor, columns: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (positions, s, t) over all S: copies [n, B, c] to work on in place, wider than bf16.

    The two buffers are the same for every chunk. Nothing is yielded if this rank has no column.
    """
    if columns == 0:
        return
    num_positions, batch, _ = student.shape
    elements = CHUNK_ELEMENTS.get(student.device.type, CHUNK_ELEMENTS["cuda"])
    step = max(1, elements // max(1, batch * columns))
    buffers = student.new_empty(
        2, min(step, num_positions), batch, columns, dtype=compute_dtype(student, teacher)
    )
    for start in range(0, num_positions, step):
        positions = slice(start, start + step)
        s, t = buffers[:, : num_positions - start]
        s.copy_(student[positions, :, :columns])
        t.copy_(teacher[positions, :, :columns])
        yield positions, s, t


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Float32 at least; float64 if either of the logits is."""
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def center_(x: Tensor, row_max: Tensor, temperature: float) -> Tensor:
    """Replace x by (x - row_max) * log2(e) / T, in this order: large logits lose no digits."""
    return x.sub_(row_max.unsqueeze(-1)).mul_(LOG2_E / temperature)


def weighted_(p: Tensor, log: Tensor) -> Tensor:
    """Replace ``log`` by p * log, and 0 where p is 0, whatever its logarithm: NaN stays NaN."""
    return log.mul_(p).masked_fill_(p == 0, 0)


def not_below_zero(loss: Tensor) -> Tensor:
    """Return a loss that only rounding makes negative. What is broken stays so: -inf becomes NaN.

    ``clamp`` would turn -inf into a loss of 0, and a run would go on with it.
    """
    return loss.clamp(min=0).masked_fill(loss.isneginf(), torch.nan)


def gather_ranks(stats: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """Return [R, ...], the ``stats`` of all ranks. No collective on one rank."""
    if tp_group is None or tp_group.size() == 1:
        return stats.unsqueeze(0)
    gathered = stats.new_empty(tp_group.size(), *stats.shape)
    torch.distributed.all_gather(list(gathered.unbind(0)), stats, group=tp_group)
    return gathered
