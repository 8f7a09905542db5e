"""Seconds of a step of given sizes and layout, at a share of a GPU's peak; letters of ``cost``."""

from dataclasses import replace

from megatron_ext.arch import forward_flops, numel_of, weights
from megatron_ext.arch.table import multiply_adds_beside
from megatron_ext.rehearsal.cost import Layout, Placed
from megatron_ext.runtime.gpus import Gpu


def token_seconds(
    model: Placed, layout: Layout, gpu: Gpu, rank: int, passes: int, again: float = 0
) -> float:
    """Return the seconds of one token on the tensor-parallel ranks of ``rank`` at peak speed.

    Args:
        model: what computes it.
        layout: of the run.
        gpu: every rank's.
        rank: the pipeline rank.
        passes: forward passes that it costs.
        again: and how many more its layers cost.
    """
    p = layout.pipeline_model_parallel_size
    arch = model.on(rank, p)
    output = 2 * arch.padded_vocab_size * arch.hidden_size
    per_layer = (forward_flops(arch, layout.seq_length) - output) / arch.num_layers
    # Attention and Mamba's states, which no FP8 computes.
    beside = 2 / arch.num_layers * multiply_adds_beside(arch, layout.seq_length)
    linear_peak = gpu.fp8 if layout.fp8 and gpu.fp8 else gpu.bf16
    one_layer = (per_layer - beside) / linear_peak + beside / gpu.bf16
    seconds = sum(model.stages[rank::p]) * one_layer * (passes + again)
    seconds += passes * output / gpu.bf16 if rank == p - 1 else 0
    return seconds / (1e12 * layout.tensor_model_parallel_size)


def step_seconds(
    student: Placed, teacher: Placed | None, layout: Layout, gpu: Gpu, mfu: float
) -> float:
    """Return the seconds of an optimizer step, pipeline bubble included.

    The slowest pipeline rank sets the pace. A student costs three forward passes, recomputed layers
    one more; a teacher one.

    Args:
        student: the model that is trained.
        teacher: the model beside it, if there is one.
        layout: of both.
        gpu: every rank's.
        mfu: the share of its peak that is reached while it computes, 0 to 1. Communication and
            everything but matrices is in it.
    """
    seconds = []
    for rank in range(layout.pipeline_model_parallel_size):
        again = recomputed_share(student, layout, rank)
        once = token_seconds(student, layout, gpu, rank, 3, again)
        if teacher:
            once += token_seconds(teacher, replace(layout, fp8=layout.teacher_fp8), gpu, rank, 1)
        seconds.append(layout.tokens * once / mfu)
    return max(seconds) * layout.num_microbatches * (1 + bubble(layout, len(student.stages)))


def forward_seconds(model: Placed, layout: Layout, gpu: Gpu, mfu: float) -> float:
    """Return the seconds of forward passes over a global batch; see ``step_seconds``."""
    ranks = range(layout.pipeline_model_parallel_size)
    once = max(token_seconds(model, layout, gpu, rank, 1) for rank in ranks) * layout.tokens / mfu
    return once * layout.num_microbatches * (1 + bubble(layout, len(model.stages)))


def recomputed_share(model: Placed, layout: Layout, rank: int) -> float:
    """Return which share of the layers of ``rank``, or of each of them, runs twice."""
    if layout.recompute_granularity != "full":
        again = {"mlp", "moe"} & set(layout.recompute_modules)
        arch = model.arch
        sizes = {w.key: numel_of(w, arch) for w in weights(arch) if w.per_layer}
        of_mlp = sum(n for key, n in sizes.items() if ".mlp." in key)
        return of_mlp / sum(sizes.values()) if again else 0
    held = model.stages[rank :: layout.pipeline_model_parallel_size]
    if layout.recompute_method == "uniform":
        return 1
    return sum(min(layout.recompute_num_layers, n) for n in held) / max(1, sum(held))


def bubble(layout: Layout, num_stages: int) -> float:
    """Return the idle share of the pipeline over its busy time: (p - 1) / (v m)."""
    p = layout.pipeline_model_parallel_size
    return (p - 1) / (num_stages // p * layout.num_microbatches)
