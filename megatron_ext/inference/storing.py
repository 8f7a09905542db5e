"""The run of tools/store_teacher.py: the training data through a teacher, its tokens to disk.

``flags`` are that program's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from megatron_ext.checkpoint import checkpoints
from megatron_ext.checkpoint.folder import Checkpoint
from megatron_ext.checkpoint.identity import tokenizer_sha256
from megatron_ext.cli.fit import (
    check_documents,
    check_experts,
    check_layout,
    virtual_pipeline_size,
)
from megatron_ext.data import datasets
from megatron_ext.distillation import stored
from megatron_ext.distillation.store_index import StoreIndex
from megatron_ext.distillation.topk import TopK, teacher_top_k
from megatron_ext.model.build import LanguageModel
from megatron_ext.model.forward import Batch, evaluating, forward, inputs
from megatron_ext.model.layers import gathered_positions
from megatron_ext.model.open import open_model, read_models
from megatron_ext.model.options import batches_of_rank, join_ranks, model_options
from megatron_ext.runtime import platform
from megatron_ext.runtime.collective_errors import on_all_ranks, on_first_rank
from megatron_ext.runtime.errors import USAGE, UserError
from megatron_ext.runtime.files import hold
from megatron_ext.runtime.platform import Platform

# About so many samples are in a file: what an interrupted run does again.
SAMPLES_PER_FILE = 64


def store_teacher(flags: Any, folder: Path) -> None:
    """Store what is not there yet of the teacher in ``folder``. Collective."""
    options, batch = flags.storing, flags.batch
    data, tokenizer, (teacher,) = read_models(flags.data, folder)
    flags = replace(flags, data=data)
    if options.kd_top_k > teacher.arch.vocab_size:
        raise UserError(
            f"--kd-top-k {options.kd_top_k}: the vocabulary has {teacher.arch.vocab_size} tokens.",
            USAGE,
        )
    check_layout(teacher.arch, flags.parallel, seq_length=batch.seq_length)
    check_experts([teacher.arch], flags.parallel)
    check_documents([teacher.arch], flags.data)
    place = join_ranks(flags, teacher.arch.num_layers)
    checkpoints.verify_integrity(teacher.folder)
    index = index_of(flags, teacher, place)
    dataset, _, _ = datasets.build_datasets(
        flags.data,
        seq_length=batch.seq_length,
        num_samples=(index.num_samples, 0, 0),
        tokenizer=tokenizer,
        seed=batch.seed,
        vocab_size=teacher.arch.vocab_size,
        masked=teacher.arch.is_bert,
    )
    on_first_rank(lambda: hold(options.kd_teacher_store, "--kd-teacher-store"))
    missing = on_first_rank(lambda: stored.begin(options.kd_teacher_store, index))
    has_masks = flags.data.reset_attention_mask
    model = model_options(flags, place, teacher.arch.num_layers, has_masks=has_masks)
    chunks = open_model(teacher, model, place.groups)
    with evaluating(chunks, logits=True), torch.no_grad():
        store_all(flags, index, missing, dataset, chunks, place)
    if place.rank == 0:
        print(f"{options.kd_teacher_store}: {index.num_samples} samples, {len(missing)} new files")
    platform.shut_down()


def index_of(flags: Any, teacher: Checkpoint, place: Platform) -> StoreIndex:
    """Return what will be in the store; files of whole micro-batches."""
    options, batch = flags.storing, flags.batch
    num_samples = options.train_iters * options.global_batch_size
    unit = batch.micro_batch_size
    if virtual_pipeline_size(flags.parallel, teacher.arch.num_layers):
        unit *= place.groups.pp.size()  # virtual stages take micro-batches by so many
    if num_samples % unit:
        raise UserError(
            f"--train-iters {options.train_iters} x --global-batch-size "
            f"{options.global_batch_size} = {num_samples} samples are not a multiple of the {unit} "
            "that go through the model at a time: change --micro-batch-size.",
            USAGE,
        )
    return StoreIndex(
        top_k=options.kd_top_k,
        temperature=options.kd_temperature,
        seq_length=batch.seq_length,
        vocab_size=teacher.arch.vocab_size,
        tokenizer_sha256=tokenizer_sha256(flags.data),
        num_samples=num_samples,
        samples_per_file=unit * max(1, SAMPLES_PER_FILE // unit),
        teacher=str(teacher.folder),
    )


def store_all(
    flags: Any,
    index: StoreIndex,
    missing: Sequence[int],
    dataset: Dataset,
    chunks: list[LanguageModel],
    place: Platform,
) -> None:
    """Write the files that begin with the samples ``missing``. Collective.

    Data-parallel ranks take files in turn. Experts may be spread over them, so all ranks take part
    in every round, the last ones with a file that another rank writes.
    """
    groups, folder = place.groups, flags.storing.kd_teacher_store
    count = groups.dp.size()
    writes = groups.tp.rank() == groups.cp.rank() == 0 and groups.pp.rank() == groups.pp.size() - 1
    rounds = range(0, len(missing), count)
    for start in tqdm(rounds, "storing", unit="file", disable=None if place.rank == 0 else True):
        mine = start + groups.dp.rank()
        first = missing[min(mine, len(missing) - 1)]
        last = min(first + index.samples_per_file, index.num_samples)
        samples = Subset(dataset, range(first, last))
        top = run(flags, samples, chunks, place)

        def finish(
            top: TopK | None = top, samples: Dataset = samples, first: int = first, mine: int = mine
        ) -> None:
            if writes and mine < len(missing):
                digests = [stored.digest(samples[i]) for i in range(len(samples))]
                stored.write(folder, first, top, digests)

        on_all_ranks(finish)


def run(flags: Any, samples: Dataset, chunks: list[LanguageModel], place: Platform) -> TopK | None:
    """Return the likeliest tokens of ``samples``, [n, s, K] on the CPU; None off the last stage."""
    batch = flags.batch
    batches = partial(
        batches_of_rank,
        samples,
        place,
        micro_batch_size=batch.micro_batch_size,
        num_workers=flags.data.num_workers,
        share=(0, 1),
    )
    found = forward(
        chunks,
        partial(forward_step, flags, place),
        [batches() for _ in chunks],
        len(samples) // batch.micro_batch_size,
        micro_batch_size=batch.micro_batch_size,
        seq_length=batch.seq_length,
    )
    if not found:
        return None
    return TopK(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def forward_step(
    flags: Any, place: Platform, batches: Iterator[Batch], model: LanguageModel
) -> tuple:
    """Run one micro-batch; what is collected is [b, s, K] twice."""
    batch = next(batches)
    output = model(*inputs(batch))

    def collect(logits: Tensor, non_loss_data: bool) -> TopK:
        top = teacher_top_k(
            logits,
            flags.storing.kd_top_k,
            temperature=flags.storing.kd_temperature,
            vocab_size=model.num_tokens,
            tp_group=place.groups.tp,
        )
        return TopK(*(whole(x, place).transpose(0, 1).cpu() for x in top))

    return output, collect


def whole(part: Tensor, place: Platform) -> Tensor:
    """Return [S, b, K] of the context-parallel ranks' [s, b, K]. One all-gather."""
    cp = place.groups.cp
    if cp.size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(cp.size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=cp)
    result = part.new_empty(len(part) * cp.size(), *part.shape[1:])
    result[gathered_positions(len(part), cp).to(part.device)] = torch.cat(parts)
    return result
