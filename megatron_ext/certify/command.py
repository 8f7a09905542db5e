"""The command line of ``minitron certify``: a program and its flags, read as that program reads."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

from megatron_ext.arch import Arch
from megatron_ext.certify.trials import Trials, of_pruning, of_training, sizes_in_words
from megatron_ext.cli.flag_checks import model_parallel_size
from megatron_ext.cli.parser import flag, parse
from megatron_ext.cli.programs import PruneFlags, TrainFlags, new_arch, parse_prune, parse_train
from megatron_ext.cli.size_flags import missing_sizes
from megatron_ext.pruning.jobs import plan_jobs
from megatron_ext.rehearsal.models import find_student, find_teacher, is_there, model_at
from megatron_ext.runtime.errors import USAGE, UserError

TRAIN, PRUNE = ("distill", "pretrain_distill.py"), ("prune", "prune.py")
PRELOAD = ("megatron_ext.certify.ranks", "torch._dynamo")
"""Modules that ranks import before they are forked."""
UNKNOWN_TOKENS = 1000
"""Vocabulary assumed for a tokenizer whose files are not here; it decides about padding."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Certify a layout: PROGRAM FLAGS as in the launch script behind these."""

    max_ranks: int = flag(8, "processes at once; larger layouts become smaller ones", at_least=1)


@dataclass(frozen=True, kw_only=True)
class Own:
    """The flags in front of the program."""

    certify: Options


def split(argv: Sequence[str]) -> tuple[int, str, list[str]]:
    """Return --max-ranks, the program's name and its flags, with the ranks of torchrun.

    Raises:
        UserError: no program is named, or a flag in front of it is unknown.
    """
    at = next((i for i, word in enumerate(argv) if Path(word).name in TRAIN + PRUNE), len(argv))
    words = [word for word in argv[:at] if word != "--"]
    launcher = words.index("torchrun") if "torchrun" in words else len(words)
    own = parse(Own, words[:launcher])
    if at == len(argv):
        raise UserError(
            "certify what? Name the program and its flags: certify pretrain_distill.py "
            "--tensor-model-parallel-size 2 ..., or prune.py.",
            USAGE,
        )
    ranks = launched(words[launcher + 1 :])
    world_size = [f"--world-size={ranks}"] if ranks else []
    return own.certify.max_ranks, Path(argv[at]).name, [*world_size, *without_lists(argv[at + 1 :])]


def launched(words: Sequence[str]) -> int | None:
    """Return the ranks that torchrun's ``words`` start; None if they do not say."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--nproc-per-node", "--nproc_per_node", type=int)
    parser.add_argument("--nnodes", type=int, default=1)
    try:
        found, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise UserError(f"torchrun: {error}; --world-size says it too.", USAGE) from None
    return found.nproc_per_node and found.nproc_per_node * found.nnodes


def without_lists(argv: Sequence[str]) -> list[str]:
    """Return ``argv`` with made-up data for files that list data: no data is read."""
    words, found = iter(argv), []
    for word in words:
        name, _, value = word.partition("=")
        if name in ("--data-args-path", "--per-split-data-args-path"):
            word = "--mock-data"
            if not value:
                next(words, None)
        found.append(word)
    return found


def ranks_typed(argv: Sequence[str]) -> int:
    """Return the ranks of the run: --world-size, WORLD_SIZE, or as few as the layout takes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("tensor-model-", "pipeline-model-", "context-", "expert-model-"):
        parser.add_argument(f"--{name}parallel-size", type=int, default=1)
    parser.add_argument("--world-size", type=int, default=int(os.environ.get("WORLD_SIZE", "0")))
    try:
        sizes, _ = parser.parse_known_args(list(argv))
    except argparse.ArgumentError:  # the program's parser says what is wrong
        return 1
    cp, ep = sizes.context_parallel_size, sizes.expert_model_parallel_size
    if min(cp, ep) < 1:
        return 1
    return sizes.world_size or model_parallel_size(sizes) // cp * lcm(cp, ep)


def training_trials(argv: Sequence[str], max_ranks: int) -> tuple[Trials, list[str]]:
    """Return the trials of ``pretrain_distill.py argv``, and lines about its models."""
    world_size = ranks_typed(argv)
    flags = parse_train([*argv, "--dry-run"], world_size)
    student, teacher = student_of(flags), find_teacher(flags)
    trials = of_training(flags, student, teacher and teacher.arch, world_size, max_ranks)
    models = {"student" if teacher else "model": (student, trials.reference.arch)}
    if teacher is not None:
        models["teacher"] = (teacher.arch, trials.reference.teacher)
    return trials, [f"{who:11} {sizes_in_words(*both)}" for who, both in models.items()]


def student_of(flags: TrainFlags) -> Arch:
    """Return the sizes of the model that is trained: of a checkpoint, a config.json or the flags.

    Raises:
        UserError: as ``find_student``; none of them says the sizes.
    """
    options = flags.checkpoint
    folders = (options.save, options.load, options.pretrained_checkpoint)
    if any(map(is_there, folders)) or flags.dry.load_config or missing_sizes(flags.sizes):
        student, _ = find_student(flags)
        if student is not None:
            return student.arch
    return new_arch(flags.sizes, flags.data.vocab_size or UNKNOWN_TOKENS)


def pruning_trials(argv: Sequence[str], max_ranks: int) -> tuple[Trials, list[str]]:
    """Return the trials of ``prune.py argv``, and lines about its models.

    Raises:
        UserError: no activation is measured: no layout enters the scores.
    """
    world_size = ranks_typed(argv)
    flags = parse_prune([*argv, "--dry-run"], world_size)
    if flags.prune.importance != "activation":
        raise UserError(
            f"--importance {flags.prune.importance} reads weights or nothing: no layout enters.",
            USAGE,
        )
    source = source_of(flags)
    jobs, _ = plan_jobs(flags, source, {})  # a layout is the same whatever the origin
    targets = [job.target for job in jobs]
    trials = of_pruning(flags, source, targets, world_size, max_ranks)
    small = trials.reference
    lines = [f"{'model':11} {sizes_in_words(source, small.arch)}"]
    return trials, lines + [
        f"{'target':11} {sizes_in_words(small.arch, target)}" for target in small.targets
    ]


def source_of(flags: PruneFlags) -> Arch:
    """Return the sizes of the model that is pruned."""
    options, config = flags.checkpoint, flags.dry.load_config
    return model_at(
        "--load", options.load, options.ckpt_step, sizes=flags.sizes, config=config
    ).arch


def head(trials: Trials, models: Sequence[str]) -> str:
    """Return what stands above the results: the run, and what stands for it."""
    batch = trials.reference.flags.batch
    samples = _samples(trials.reference.flags)
    lines = [
        f"{'run':11} {trials.real}",
        *(f"{'in small':11} {trial.name}" for trial in trials.layouts),
        *models,
        f"{'batch':11} {samples} samples of {batch.seq_length} tokens, micro-batches of "
        f"{batch.micro_batch_size}, float64, no dropout",
    ]
    if trials.left_out:
        lines.append(f"{'left out':11} {' '.join(trials.left_out)}")
    return "\n".join(lines)


def _samples(flags: Any) -> int:
    if isinstance(flags, PruneFlags):
        return flags.prune.calibration_samples
    return flags.batch.global_batch_size
