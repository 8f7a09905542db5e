"""The run of tools/evaluate.py: all of the data through a model, alone or beside its teacher.

``flags`` are that program's.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from tqdm import tqdm

from megatron_ext.checkpoint import checkpoints
from megatron_ext.checkpoint.folder import Checkpoint
from megatron_ext.checkpoint.identity import check_comparable, padded_alike
from megatron_ext.cli import megatron_flags as group
from megatron_ext.cli.fit import check_experts, check_layout
from megatron_ext.data.data_check import check_token_ids
from megatron_ext.data.documents import Documents
from megatron_ext.data.masked_lm import FRAME, MaskedTokens, SpecialTokens, special_tokens
from megatron_ext.distillation.losses import LM_LOSS, vocab_parallel_kl
from megatron_ext.distillation.model import Distillation, DistillationModel
from megatron_ext.distillation.placement import layouts_of_both
from megatron_ext.distillation.topk import teacher_top_k
from megatron_ext.model.build import LanguageModel
from megatron_ext.model.open import open_model, read_models
from megatron_ext.model.options import batches_of_rank, join_ranks, model_options
from megatron_ext.runtime import platform
from megatron_ext.runtime.collective_errors import on_all_ranks, on_first_rank
from megatron_ext.runtime.files import written_aside
from megatron_ext.runtime.platform import Platform
from megatron_ext.training.step import Batch, StepShape, Wrapped, evaluate

TEACHER_LOSS, KL, AGREEMENT = "teacher lm loss", "kl(teacher || student)", "top-1 agreement"


class Comparison(DistillationModel):
    """Student and teacher as one pipeline stage, which returns what tells them apart."""

    def _losses(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Return {name: [b, s] float32}; logits are [s, b, v]."""
        where = {"vocab_size": self.distillation.vocab_size, "tp_group": self.tp_group}
        kl = vocab_parallel_kl(student_logits, teacher_logits, **where)
        own, other = (teacher_top_k(x, 1, **where).tokens for x in (student_logits, teacher_logits))
        # Last, because megatron-core's cross entropy overwrites float32 logits.
        return {
            KL: kl.transpose(0, 1),
            AGREEMENT: (own == other).squeeze(-1).transpose(0, 1).float(),
            LM_LOSS: self.student.compute_language_model_loss(labels, student_logits),
            TEACHER_LOSS: self.teacher.compute_language_model_loss(labels, teacher_logits),
        }


def evaluate_checkpoint(flags: Any, folder: Path, teacher_folder: Path | None) -> None:
    """Print the figures of the checkpoint in ``folder``. Collective."""
    options = flags.evaluation
    folders = [*([teacher_folder] if teacher_folder else []), folder]
    _, tokenizer, (*teachers, source) = read_models(flags.tokenizer, *folders)
    teacher = teachers[0] if teachers else None
    own = others = flags.parallel
    if teacher:
        depths = source.arch.num_layers, teacher.arch.num_layers
        own, others = layouts_of_both(flags.parallel, *depths, ())
        teacher_arch = padded_alike(teacher.arch, source.arch)
        check_comparable(source.arch, teacher_arch)
        check_layout(teacher_arch, others, seq_length=flags.batch.seq_length)
    check_layout(source.arch, own, seq_length=flags.batch.seq_length)
    check_experts([model.arch for model in (source, teacher) if model], own)
    flags = replace(flags, parallel=own)
    prefixes = [path.removesuffix(".bin").removesuffix(".idx") for path in options.data_path]
    place = join_ranks(flags, source.arch.num_layers)
    for model in filter(None, (source, teacher)):
        checkpoints.verify_integrity(model.folder)
    vocab_size = source.arch.vocab_size
    on_all_ranks(lambda: [check_token_ids(path, vocab_size) for path in prefixes])
    special = special_tokens(tokenizer, vocab_size) if source.arch.is_bert else None
    documents = documents_of(flags, prefixes, place, special)
    on_all_ranks(lambda: documents.check_token_ids(vocab_size, place.rank, place.world_size))
    modules = build(flags, others, source, teacher, place)
    figures = measure(flags, modules, documents, place, special, has_teacher=teacher is not None)
    if place.rank == 0:
        print(table(figures))
    if options.json:
        on_first_rank(lambda: write_json(options.json, figures))
    platform.shut_down()


def build(
    flags: Any,
    teacher_parallel: group.Parallel,
    source: Checkpoint,
    teacher: Checkpoint | None,
    place: Platform,
) -> list[MegatronModule]:
    """Return this rank's chunks of the model, each beside its teacher's if there is one."""
    options = model_options(flags, place, source.arch.num_layers)

    def load(model: Checkpoint, layout: str | None) -> list[LanguageModel]:
        laid_out = replace(options, pipeline_model_parallel_layout=layout)
        return open_model(model, laid_out, place.groups, arch=padded_alike(model.arch, source.arch))

    chunks = load(source, options.pipeline_model_parallel_layout)
    if teacher is None:
        return chunks
    teachers = load(teacher, teacher_parallel.pipeline_model_parallel_layout)
    distillation = Distillation(vocab_size=source.arch.vocab_size)
    return [
        Comparison(student, frozen, distillation, place.groups.tp)
        for student, frozen in zip(chunks, teachers, strict=True)
    ]


def documents_of(
    flags: Any, prefixes: Sequence[str], place: Platform, special: SpecialTokens | None
) -> Documents:
    """Return the samples to read, a multiple of what goes through the model at a time."""
    batch, groups = flags.batch, place.groups
    length = batch.seq_length - FRAME * (special is not None)
    # Virtual stages take micro-batches by the number of pipeline ranks.
    multiple = batch.micro_batch_size * groups.dp.size() * groups.pp.size()
    return Documents(prefixes, length, multiple, flags.evaluation.eval_samples)


def measure(
    flags: Any,
    modules: Sequence[MegatronModule],
    documents: Documents,
    place: Platform,
    special: SpecialTokens | None,
    *,
    has_teacher: bool,
) -> dict[str, float]:
    """Return the figures by name, equal on all ranks; all data in one pass. Collective.

    ``special`` are the tokens that a masked language model needs; None for another.
    """
    options, batch, groups = flags.evaluation, flags.batch, place.groups
    per_pass = batch.micro_batch_size * groups.dp.size()
    dataset = MaskedTokens(documents, special, batch.seed) if special else documents
    shape = StepShape(
        num_microbatches=len(documents) // per_pass,
        micro_batch_size=batch.micro_batch_size,
        seq_length=batch.seq_length,
    )

    def batches(chunk: int) -> Iterator[Batch]:
        found = batches_of_rank(
            dataset,
            place,
            micro_batch_size=batch.micro_batch_size,
            num_workers=options.num_workers,
        )
        is_quiet = None if place.rank == chunk == 0 else True  # None: only in a terminal
        return tqdm(found, "evaluating", shape.num_microbatches, unit="batch", disable=is_quiet)

    names = (LM_LOSS, TEACHER_LOSS, KL, AGREEMENT) if has_teacher else (LM_LOSS,)
    iterators = [iter(batches(chunk)) for chunk in range(len(modules))]
    with torch.no_grad():
        losses = evaluate(Wrapped(model=modules, groups=groups), iterators, shape, names)
    figures = {"tokens": documents.num_tokens}
    for name in names:
        figures[name] = losses[name]
        if name in (LM_LOSS, TEACHER_LOSS):
            figures[name.replace("lm loss", "perplexity")] = _exp(losses[name])
    return figures


def _exp(loss: float) -> float:
    """Return the perplexity of a loss, also where that is more than a float can hold."""
    return math.exp(loss) if loss < 700 else math.inf


def table(figures: dict[str, float]) -> str:
    """Return the figures as lines of text."""
    rows = [
        (name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
        for name, value in figures.items()
    ]
    return "\n".join(f"{name:24}{value:>14}" for name, value in rows)


def write_json(path: str, figures: dict[str, float]) -> None:
    """Write the figures as one JSON object."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(figures, indent=1) + "\n")
