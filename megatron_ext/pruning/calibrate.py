"""Forward passes over calibration data, with every axis scored in the same passes."""

from collections.abc import Iterator
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from megatron_ext import data
from megatron_ext.arch import Arch
from megatron_ext.model import LanguageModel
from megatron_ext.platform import Platform
from megatron_ext.pruning.importance import Importance


@torch.no_grad()
def calibrate(
    chunks: list[LanguageModel],
    arch: Arch,
    dataset: Dataset,
    place: Platform,
    *,
    num_samples: int,
    micro_batch_size: int,
    seq_length: int,
    num_workers: int,
) -> dict[str, Tensor]:
    """Return the scores of every axis over the first ``num_samples`` of ``dataset``. Collective.

    Samples are dealt to the data-parallel ranks; the output layer is left out, since no score
    reads logits. Vectors are float32 and the same on every rank (``Importance.collect``).
    """
    config, groups = chunks[0].config, place.groups
    importance = Importance(chunks, arch, groups, sequence_parallel=config.sequence_parallel)
    options = {
        "micro_batch_size": micro_batch_size,
        "dp_rank": groups.dp.rank(),
        "dp_size": groups.dp.size(),
        "consumed_samples": 0,
        "num_workers": num_workers,
    }
    iterators = [_on_device(data.batches(dataset, **options), place) for _ in chunks]
    # A schedule takes several micro-batches at once; a pipeline of depth p is busy with 2p of them.
    total = num_samples // (micro_batch_size * groups.dp.size())
    at_once = 2 * groups.pp.size()
    for chunk in chunks:
        chunk.eval()
        chunk.post_process = False
    with (
        importance.attached(),
        tqdm(total=num_samples, desc="calibration", unit="sample", disable=place.rank != 0) as bar,
    ):
        for begin in range(0, total, at_once):
            count = min(at_once, total - begin)
            get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=iterators,
                model=chunks,
                num_microbatches=count,
                seq_length=seq_length,
                micro_batch_size=micro_batch_size,
                forward_only=True,
                collect_non_loss_data=True,
            )
            bar.update(count * micro_batch_size * groups.dp.size())
    return importance.collect()


def _forward_step(batches: Iterator[dict[str, Tensor]], model: LanguageModel) -> tuple:
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"))
    return output, _nothing


def _nothing(output: Tensor, non_loss_data: bool) -> None:
    """Keep nothing of a forward pass: the hooks have seen it."""


def _on_device(
    batches: Iterator[dict[str, Tensor]], place: Platform
) -> Iterator[dict[str, Tensor]]:
    shard = partial(
        data.shard_for_context_parallel,
        cp_rank=place.groups.cp.rank(),
        cp_size=place.groups.cp.size(),
    )
    for batch in batches:
        yield {name: x.to(place.device, non_blocking=True) for name, x in shard(batch).items()}
