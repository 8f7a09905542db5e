"""Forward passes without a loss: calibration, depth scores, a teacher's likeliest tokens.

Each caller's forward step says what is kept of an output. The losses of an evaluation are
``training.step.evaluate`` instead: it takes the forward step and schedule of a training step, so
that it reports what training reports and a captured step serves both.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ext.model.build import LanguageModel

Batch = dict[str, Tensor]


def forward(
    chunks: Sequence[LanguageModel],
    forward_step: Callable,
    jobs: Sequence[Iterator[Any]],
    num_microbatches: int,
    *,
    micro_batch_size: int,
    seq_length: int,
) -> list[Any]:
    """Run micro-batches through the pipeline in order. Collective.

    Args:
        chunks: this rank's part of a model.
        forward_step: as megatron-core's schedules call it; takes its micro-batch from an iterator
            of ``jobs`` and returns the output and a function that says what is kept of it.
        jobs: an iterator for each of ``chunks``, all of the same.
        num_microbatches: taken of each; with virtual stages a multiple of the pipeline stages.
        micro_batch_size: samples of each.
        seq_length: positions of a sample over all context-parallel ranks.

    Returns:
        On the last stage what is kept of each micro-batch; elsewhere nothing.
    """
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=list(jobs),
        model=list(chunks),
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )


def inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what a language model is called with."""
    return batch["tokens"], batch["position_ids"], batch.get("attention_mask")


@contextmanager
def evaluating(chunks: Sequence[LanguageModel], *, logits: bool) -> Iterator[None]:
    """Set ``chunks`` to evaluation, without ``logits`` up to the last norm; as before on exit."""
    before = [(chunk.training, chunk.post_process) for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
        chunk.post_process = chunk.post_process and logits
    try:
        yield
    finally:
        for chunk, (training, post_process) in zip(chunks, before, strict=True):
            chunk.train(training)
            chunk.post_process = post_process
