"""What is refused, or known, before torch and megatron-core are imported: flags against files.

Every rank comes to the same conclusion: files lie on storage that all of them share. The run makes
these checks again where it has the model, its groups and its tokenizer at hand.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.folder import Checkpoint, find, incomplete_reason, iterations
from megatron_ext.checkpoint.quick_read import glance
from megatron_ext.cli.flag_checks import model_parallel_size
from megatron_ext.cli.programs import PruneFlags, TrainFlags, check_against_checkpoint, measures
from megatron_ext.cli.size_flags import check_source
from megatron_ext.data import data_check
from megatron_ext.data.vocabulary import check_tokenizer_file
from megatron_ext.distillation.settings import check_models
from megatron_ext.pruning.jobs import check_jobs, check_passes
from megatron_ext.runtime.errors import CHECKPOINT, UserError


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    source: Checkpoint | None
    """None: random weights."""
    resume: bool = False
    """Take optimizer, schedule, generators and counters too, not the weights alone."""
    teacher: Checkpoint | None = None


def find_start(flags: TrainFlags) -> Start:
    """Return where to begin, and with which teacher.

    Raises:
        UserError: as ``_find_student``; the teacher is no checkpoint.
    """
    start, teacher_load = _find_student(flags), flags.distill.teacher_load
    return replace(start, teacher=glance(teacher_load)) if teacher_load else start


def _find_student(flags: TrainFlags) -> Start:
    """Return the start at --save's checkpoint, else --load's, else --pretrained-checkpoint's.

    Raises:
        UserError: --load names a folder without a checkpoint, and it is not the folder to save to;
            --save holds iterations of which none was finished.
    """
    options = flags.checkpoint
    own = find(options.save) if options.save else None
    if own and options.save != options.load:
        return Start(glance(str(own)), resume=True)
    if options.save and not own:
        _check_nothing_is_lost(options.save)
    found = find(options.load, options.ckpt_step) if options.load else None
    if found:
        source = glance(str(found), sizes=flags.sizes)
        is_own = options.load == options.save
        resume = source.iteration > 0 and (is_own or not options.finetune)
        return Start(source, resume)
    may_be_new = options.load in (None, options.save) and not options.exit_on_missing_checkpoint
    if options.load and not (may_be_new or options.pretrained_checkpoint):
        raise UserError(
            f"--load {options.load}: no checkpoint there. (Only a run whose --load is its --save "
            "may begin without one.)",
            CHECKPOINT,
        )
    if options.pretrained_checkpoint:
        return Start(glance(options.pretrained_checkpoint, sizes=flags.sizes))
    return Start(None)


def _check_nothing_is_lost(save: str) -> None:
    """Refuse to begin anew where iterations are: saves of this program leave whole ones only."""
    for folder in iterations(save)[:1]:
        raise UserError(
            f"--save {save}: {folder.name} is there, but {incomplete_reason(folder)}; move the "
            "iter_* folders away to begin anew, or give another --save.",
            CHECKPOINT,
        )


def check_training(flags: TrainFlags, start: Start, world_size: int) -> None:
    """Refuse a training run that begins at ``start``, as far as files and sizes say."""
    check_tokenizer_file(flags.data)
    teacher = start.teacher
    known = [source for source in (start.source, teacher) if source is not None]
    if start.source is not None and all(source.knows_tokens for source in known):
        arch = check_against_checkpoint(flags.sizes, start.source.arch)
        check_models(flags, arch, teacher and teacher.arch, has_weights=True)
    batch, log = flags.batch, flags.log
    num_train = 0 if batch.skip_train else 1
    num_valid = 1 if log.eval_iters and (log.eval_interval or batch.skip_train) else 0
    check_data_files(flags.data, (num_train, num_valid, num_valid), world_size)


def check_pruning(flags: PruneFlags, world_size: int) -> Path:
    """Refuse what ``prune.py`` cannot do with these files; return the checkpoint's folder."""
    source = glance(flags.checkpoint.load, flags.checkpoint.ckpt_step, flags.sizes)
    check_source(flags.sizes, source.arch)
    if flags.data.tokenizer_type:
        check_tokenizer_file(flags.data)
    if not flags.prune.searches:  # a search takes its time, and is done once
        check_jobs(flags, source.arch, source.hf_config)
    if measures(flags.checkpoint, flags.prune):
        check_passes(
            flags, source.arch.num_layers, world_size // model_parallel_size(flags.parallel)
        )
        check_data_files(flags.data, (1, 0, 0), world_size)
    return source.folder


def check_data_files(data: Any, num_samples: tuple[int, int, int], world_size: int) -> None:
    """Refuse indexed data that is not there; ``num_samples`` says which splits are read.

    Only a process that is alone: of several, the run's first rank looks, and all fail together.
    """
    if data.mock_data or world_size > 1 or not any(num_samples):
        return
    for prefix in data_check.all_prefixes(data_check.sources(data, num_samples)):
        data_check.check_index(prefix)
