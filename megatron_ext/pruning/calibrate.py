"""Forward passes over calibration data, with every axis scored in the same passes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from megatron_ext.arch import Arch
from megatron_ext.model.build import LanguageModel
from megatron_ext.model.forward import Batch, evaluating, forward, inputs
from megatron_ext.model.options import batches_of_rank
from megatron_ext.pruning.aggregation import DEFAULT, Aggregation
from megatron_ext.pruning.importance import Importance
from megatron_ext.runtime.platform import Platform


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Forward passes of this rank's part of a model over its share of the calibration data."""

    chunks: list[LanguageModel]
    arch: Arch
    """Sizes of the whole model."""
    dataset: Dataset
    place: Platform
    num_samples: int
    """Samples of ``dataset`` that are read, dealt to the data-parallel ranks."""
    micro_batch_size: int
    seq_length: int
    num_workers: int

    def batches(self, title: str) -> Iterator[Batch]:
        """Yield this rank's micro-batches, on its device; rank 0 shows a progress bar."""
        batches = batches_of_rank(
            self.dataset,
            self.place,
            micro_batch_size=self.micro_batch_size,
            num_workers=self.num_workers,
        )
        step, is_quiet = self.micro_batch_size * self.place.groups.dp.size(), self.place.rank != 0
        with tqdm(total=self.num_samples, desc=title, unit="sample", disable=is_quiet) as bar:
            for batch in islice(batches, self.num_samples // step):
                yield batch
                bar.update(step)

    def run(self, jobs: Sequence[Any], forward_step: Callable) -> list[Any]:
        """Run ``jobs`` through the pipeline in order: ``forward_step`` takes an iterator of them.

        Collective. With virtual stages, jobs must come by the number of pipeline stages.

        Returns:
            On the last stage what the loss function of each job returns; elsewhere nothing.
        """
        return forward(
            self.chunks,
            forward_step,
            [iter(jobs) for _ in self.chunks],
            len(jobs),
            micro_batch_size=self.micro_batch_size,
            seq_length=self.seq_length,
        )


@torch.no_grad()
def calibrate(passes: Passes, aggregation: Aggregation = DEFAULT) -> dict[str, Tensor]:
    """Return the scores of every axis. Collective.

    The output layer is left out, since no score reads logits. Vectors are float32 and the same on
    every rank (``Importance.collect``).
    """
    chunks, groups = passes.chunks, passes.place.groups
    importance = Importance(
        chunks,
        passes.arch,
        groups,
        sequence_parallel=chunks[0].config.sequence_parallel,
        aggregation=aggregation,
    )
    forward_step = partial(_forward_step, importance)
    batches = passes.batches("calibration")
    with evaluating(chunks, logits=False), importance.attached():
        # p stages wait for p - 1 micro-batches of each round: a third of the time with 2p.
        while several := list(islice(batches, 2 * groups.pp.size())):
            passes.run(several, forward_step)
    return importance.collect()


def _forward_step(importance: Importance, batches: Iterator[Batch], model: LanguageModel) -> tuple:
    batch = next(batches)
    importance.expect(counted_positions(batch))
    return model(*inputs(batch)), _nothing


def counted_positions(batch: Batch) -> Tensor:
    """Return [b, s], 0 at positions that say nothing of a model: padding.

    A language model predicts all others; a masked one a few, and sees all.
    """
    return batch.get("padding_mask", batch["loss_mask"])


def _nothing(output: Tensor, non_loss_data: bool) -> None:
    """Keep nothing of a forward pass: the hooks have seen it."""
