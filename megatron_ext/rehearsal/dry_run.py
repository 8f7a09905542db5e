"""--dry-run: what can be known of a run before its ranks, weights and GPUs are there.

Checks that a program makes anyway stay in the program; here is what takes the place of files that
do not exist yet, and the report.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.arch import Arch
from megatron_ext.arch.axes import SIZES
from megatron_ext.checkpoint.folder import find
from megatron_ext.checkpoint.identity import check_tokenizer, tokenizer_sha256, with_own_tokenizer
from megatron_ext.checkpoint.quick_read import glance
from megatron_ext.cli.flag_checks import model_parallel_size
from megatron_ext.cli.programs import (
    PruneFlags,
    TrainFlags,
    check_against_checkpoint,
    measures,
    new_arch,
)
from megatron_ext.cli.size_flags import check_source
from megatron_ext.convert.config import arch_of, with_positions
from megatron_ext.convert.fit import export_note
from megatron_ext.data import data_check
from megatron_ext.data.vocabulary import vocab_size
from megatron_ext.distillation.settings import check_models, check_stored_teacher
from megatron_ext.model import cuda_graphs
from megatron_ext.model.fp8 import check_fp8_layers, fp8_settings
from megatron_ext.pruning.jobs import check_jobs, check_outputs, check_passes, given_plan
from megatron_ext.pruning.targets import target_arch
from megatron_ext.rehearsal import cost_report as report
from megatron_ext.rehearsal.cost import GPUS
from megatron_ext.rehearsal.cost_report import Named
from megatron_ext.runtime.errors import CHECKPOINT, USAGE, UserError

# Import pads the vocabulary to a multiple of this by default.
VOCAB_MULTIPLE = 128
NEW = "the flags"
"""Where the sizes of a new model stand."""


def found_arch(
    folder: str | None, step: int | None = None, sizes: Mapping[str, Any] | None = None
) -> Arch | None:
    """Return the sizes of the model in ``folder``, or None if no checkpoint is there yet.

    ``sizes`` were typed, and hold where the checkpoint says none.
    """
    if folder is None or not Path(folder).exists():
        return None
    found = find(folder, step)
    return glance(str(found), sizes=sizes).arch if found else None


def arch_at(
    flag: str,
    folder: str | None,
    step: int | None,
    config: str | None,
    sizes: Mapping[str, Any] | None = None,
) -> Named:
    """Return the model that ``folder`` holds or will hold.

    Args:
        flag: that names the folder, for messages.
        folder: of a checkpoint.
        step: its iteration; None for the latest.
        config: a Hugging Face config.json, used where there is no checkpoint.
        sizes: as of ``found_arch``.

    Raises:
        UserError: neither is there, or it cannot be read.
    """
    arch = found_arch(folder, step, sizes)
    if arch is not None:
        return arch, str(folder)
    option = "--teacher-config" if flag == "--teacher-load" else "--load-config"
    if config is None:
        raise UserError(
            f"{flag} {folder}: no checkpoint there yet; {option} can say the sizes.", CHECKPOINT
        )
    return config_arch(option, config), config


def origin_of(
    where: str, step: int | None, config: str | None, sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the config.json that a model of ``arch_at`` comes from; empty of another origin."""
    if where == config:
        return read_config("--load-config", where)
    return glance(where, step, sizes).hf_config


def config_arch(
    flag: str, path: str, multiple: int = VOCAB_MULTIPLE, positions: int | None = None
) -> Arch:
    """Return the sizes in a config.json, its vocabulary padded to ``multiple`` as import does.

    ``positions`` in place of those of the file, if given.
    """
    config = with_positions(read_config(flag, path), positions)
    try:
        return arch_of(config, make_vocab_size_divisible_by=multiple)
    except ValueError as error:
        raise UserError(f"{flag} {path}: {error}.", CHECKPOINT) from None


def read_config(flag: str, path: str) -> dict[str, Any]:
    """Return what a config.json holds."""
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{flag} {path} cannot be read: {reason}.", CHECKPOINT) from error
    if not isinstance(config, dict):
        raise UserError(f"{flag} {path}: holds no table of settings.", CHECKPOINT)
    return config


def student_of(flags: TrainFlags) -> Named:
    """Return the model that ``pretrain_distill.py`` would train.

    As there: of --save, else --load, else --pretrained-checkpoint, else a new one. Before the last
    comes --load-config: of what it says, sizes that pruning cuts may be typed otherwise.
    """
    options, config = flags.checkpoint, flags.dry.load_config
    for folder, step in (
        (options.save if options.save != options.load else None, None),
        (options.load, options.ckpt_step),
        (options.pretrained_checkpoint, None),
    ):
        arch = found_arch(folder, step, flags.sizes)
        if arch is not None:
            return check_against_checkpoint(flags.sizes, arch), str(folder)
    may_be_new = options.load in (None, options.save) and not options.pretrained_checkpoint
    may_be_new &= not (options.load and options.exit_on_missing_checkpoint)
    if config is None and may_be_new:
        return new_arch(flags.sizes, vocab_size(flags.data)), NEW
    flag = "--pretrained-checkpoint" if options.load is None else "--load"
    arch, where = arch_at(flag, options.load or options.pretrained_checkpoint, None, config)
    return with_sizes(arch, flags.sizes, may_cut=True), where


def with_sizes(arch: Arch, sizes: Mapping[str, Any], *, may_cut: bool) -> Arch:
    """Return ``arch`` checked against the typed sizes.

    ``may_cut``: it is that of the model before pruning, and typed sizes that pruning cuts win.
    """
    if may_cut:
        cut = {name: sizes[name] for name in SIZES if name in sizes}
        try:
            arch = target_arch(arch, **cut)
        except UserError as error:
            raise UserError(str(error).replace("--target-", "--"), error.code) from None
    return check_against_checkpoint(sizes, arch)


def teacher_of(flags: TrainFlags) -> Named | None:
    """Return the teacher, if there is to be one."""
    folder, config = flags.distill.teacher_load, flags.dry.teacher_config
    return arch_at("--teacher-load", folder, None, config) if folder or config else None


def with_tokenizer_of(flags: Any, model: Named | None) -> Any:
    """Return ``flags`` with the tokenizer beside a model, if none is typed and one is there."""
    if model is None or not Path(model[1]).is_dir():
        return flags
    source = glance(model[1], sizes=flags.sizes)
    return replace(flags, data=with_own_tokenizer(flags.data, source))


def train(flags: TrainFlags, world_size: int) -> int:
    """Rehearse ``pretrain_distill.py``; returns the exit code."""
    teacher = teacher_of(flags)
    flags = with_tokenizer_of(flags, teacher)
    student = student_of(flags)
    flags = with_tokenizer_of(flags, student)
    flags, teacher_parallel = check_models(
        flags, student[0], teacher and teacher[0], has_weights=student[1] != NEW
    )
    check_layers_there(flags)
    batch, log = flags.batch, flags.log
    num_train = 0 if batch.skip_train else batch.global_batch_size * batch.train_iters
    evaluates = log.eval_iters and (log.eval_interval or batch.skip_train)
    num_valid = batch.global_batch_size * log.eval_iters if evaluates else 0
    models = [student, *([teacher] if teacher else [])]
    absent = check_data_there(flags, models, (num_train, num_valid, num_valid))
    store = flags.distill.kd_teacher_store
    if store is not None and not Path(store).exists():
        absent.append(f"stored teacher {store}")
    elif store is not None and not absent:
        check_stored_teacher(flags, vocab_size(flags.data))
    text, needs = report.of_training(flags, student, teacher, teacher_parallel, world_size)
    return finish(text, needs, absent, flags.dry.gpu)


def check_layers_there(flags: TrainFlags) -> None:
    """Refuse what layers or device do not have, as the program does, or --gpu does not."""
    device = flags.parallel.device or "cuda"
    engine = "local" if device == "cpu" else "transformer_engine"
    impl = flags.parallel.transformer_impl or engine
    cuda_graphs.check_machine(flags.graphs, device=device, transformer_impl=impl)
    check_fp8_layers(flags.fp8, impl)
    if GPUS[flags.dry.gpu].fp8 is None:
        for typed in fp8_settings(flags.fp8):
            raise UserError(f"{typed}: --gpu {flags.dry.gpu} has no FP8.", USAGE)


def prune(flags: PruneFlags, world_size: int) -> int:
    """Rehearse ``prune.py``; returns the exit code."""
    options, is_measured = flags.checkpoint, measures(flags.checkpoint, flags.prune)
    source, where = arch_at(
        "--load", options.load, options.ckpt_step, flags.dry.load_config, flags.sizes
    )
    check_source(flags.sizes, source)
    origin = origin_of(where, options.ckpt_step, flags.dry.load_config, flags.sizes)
    flags = with_tokenizer_of(flags, (source, where))
    jobs, found = check_jobs(flags, source, origin)
    check_outputs(flags, jobs, found)
    residual, scores = flags.prune.head_residual, flags.prune.scores
    plans = [
        given_plan(job, source, residual, origin) if job.plan and Path(job.plan).exists() else None
        for job in jobs
    ]
    if None in plans and scores and Path(scores).exists():
        from megatron_ext.pruning.scores_file import check_scores, load_scores  # with torch

        check_scores(load_scores(scores), source)
    absent = []
    if is_measured:
        check_passes(flags, source.num_layers, world_size // model_parallel_size(flags.parallel))
        num_samples = flags.prune.calibration_samples
        absent = check_data_there(flags, [(source, where)], (num_samples, 0, 0))
    targets = [
        (plan.target if plan else job.target, job.save or job.plan or NEW)
        for job, plan in zip(jobs, plans, strict=True)
    ]
    for target, _ in targets:
        if note := export_note(target, source, origin):
            print(f"NOTE: {note}")
    text, needs = report.of_pruning(flags, (source, where), targets, world_size)
    return finish(text, needs, absent, flags.dry.gpu)


def finish(text: str, needs: Mapping[str, int], absent: Sequence[str], gpu: str) -> int:
    """Print a report, refuse what does not fit ``gpu``, and say OK; returns the exit code."""
    print(text)
    for what in absent:
        print(f"{'not checked':12}{what}: not there")
    report.check_memory(needs, gpu)
    print("OK")
    return 0


def check_data_there(
    flags: Any, models: Sequence[Named], num_samples: tuple[int, int, int]
) -> list[str]:
    """Check tokenizer and data as far as they are there; return what is not.

    Args:
        flags: of a program, with data flags.
        models: that read them.
        num_samples: requested of train, valid and test.

    Raises:
        UserError: as ``vocabulary.vocab_size`` and ``data_check.check_data``; or the tokenizer is
            not that of a model.
    """
    options, absent = flags.data, []
    num_rows = models[0][0].vocab_size
    files = [f for f in (options.tokenizer_model, options.vocab_file, options.merge_file) if f]
    missing = [name for name in files if not Path(name).exists()]
    if missing:
        absent += [f"tokenizer {name}" for name in missing]
    else:
        num_tokens = num_rows = vocab_size(options)
        for arch, where in models:
            if Path(where).is_dir():
                source = glance(where, sizes=flags.sizes).with_tokens(num_tokens)
                check_tokenizer(source, num_tokens, tokenizer_sha256(options))
                num_rows = min(num_rows, source.arch.vocab_size)
            elif num_tokens > arch.padded_vocab_size:
                raise UserError(
                    f"--tokenizer-type {options.tokenizer_type}: {num_tokens} tokens, {where} has "
                    f"{arch.padded_vocab_size}: give the model's own tokenizer.",
                    CHECKPOINT,
                )
    if options.mock_data or not any(num_samples):
        return absent
    prefixes = data_check.all_prefixes(data_check.sources(options, num_samples))
    for prefix in prefixes:
        if any(Path(f"{prefix}.{end}").exists() for end in ("idx", "bin")):
            data_check.check_token_ids(prefix, num_rows)
        else:
            absent.append(f"data {prefix}")
    if not absent:
        data_check.check_data(
            options,
            seq_length=flags.batch.seq_length,
            num_samples=num_samples,
            vocab_size=num_rows,
        )
    return absent
