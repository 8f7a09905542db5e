"""Jobs of one run of prune.py: one target or several, and where each goes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.arch import Arch
from megatron_ext.checkpoint.folder import find
from megatron_ext.cli.fit import (
    check_documents,
    check_experts,
    check_layout,
    check_targets,
    virtual_pipeline_size,
)
from megatron_ext.cli.method_flags import AUTO
from megatron_ext.cli.programs import PruneFlags
from megatron_ext.convert.config import Config
from megatron_ext.convert.fit import check_target
from megatron_ext.pruning.budget import Use, around, read_budget
from megatron_ext.pruning.plan import Plan, check_plan, load_plan
from megatron_ext.pruning.search import as_yaml, auto_space, candidates, read_space, table
from megatron_ext.pruning.targets import read_targets, same_sizes, target_arch
from megatron_ext.runtime.errors import USAGE, UserError
from megatron_ext.runtime.files import written_aside


@dataclass(frozen=True)
class Job:
    """One model to prune to."""

    target: Arch
    save: str | None
    """Folder of the pruned checkpoint."""
    plan: str | None
    """The plan's file."""


@dataclass(frozen=True)
class Found:
    """The candidates of a search space."""

    targets: Mapping[str, Arch]
    table: str
    yaml: str
    """Text for the file of --targets."""


def plan_jobs(flags: PruneFlags, source: Arch, origin: Config) -> tuple[list[Job], Found | None]:
    """Return what to prune to, checked against the model, the layout, the method and an export.

    With it what a search found, if there is one. ``origin`` as for ``check_target``.
    """
    check_layout(source, flags.parallel, seq_length=flags.batch.seq_length)
    check_experts([source], flags.parallel)
    check_documents([source], flags.data)
    found = search(flags, source, origin)
    jobs = find_jobs(flags, source, found)
    check_targets(source, [job.target for job in jobs], flags.prune)
    for job in jobs:
        check_target(job.target, source, origin)
    return jobs, found


def check_passes(flags: PruneFlags, num_layers: int, data_parallel_size: int) -> None:
    """Refuse a number of samples that the ranks do not share evenly."""
    num_samples, micro_batch_size = flags.prune.calibration_samples, flags.batch.micro_batch_size
    per_pass = micro_batch_size * data_parallel_size
    pp = flags.parallel.pipeline_model_parallel_size
    if num_samples % per_pass:
        raise UserError(
            f"--calibration-samples {num_samples} is not a multiple of --micro-batch-size "
            f"{micro_batch_size} x {data_parallel_size} data-parallel ranks.",
            USAGE,
        )
    if virtual_pipeline_size(flags.parallel, num_layers) and num_samples // per_pass % pp:
        raise UserError(
            f"--calibration-samples {num_samples} are {num_samples // per_pass} micro-batches of a "
            f"rank: virtual stages need a multiple of --pipeline-model-parallel-size {pp}.",
            USAGE,
        )


def search(flags: PruneFlags, source: Arch, origin: Config) -> Found | None:
    """Return the candidates of a search; None without one, and where --targets exists."""
    options = flags.prune
    if not options.searches or (options.targets and Path(options.targets).exists()):
        return None
    assert options.search_space is not None, "the flags were not checked"
    is_auto = options.search_space == AUTO
    space = auto_space(source) if is_auto else read_space(options.search_space, source)
    use = Use(options.budget_context or flags.batch.seq_length, options.budget_batch)
    limits = []
    if options.target_params is not None:
        limits += around(options.target_params, options.target_tolerance)
    if options.target_budget is not None:
        limits += read_budget(options.target_budget, source, use, options.target_tolerance)
    targets = exportable(candidates(source, space, limits, use), source, origin)
    return Found(targets, table(targets), as_yaml(targets, space))


def exportable(targets: Mapping[str, Arch], source: Arch, origin: Config) -> dict[str, Arch]:
    """Return those of ``targets`` that some family holds.

    Raises:
        UserError: none is; what is wrong with the last of them.
    """
    found, problem = {}, None
    for name, target in targets.items():
        try:
            check_target(target, source, origin)
            found[name] = target
        except UserError as error:
            problem = error
    if not found:
        raise UserError(f"--search-space: none of {len(targets)} candidates: {problem}", USAGE)
    return found


def find_jobs(flags: PruneFlags, source: Arch, found: Found | None) -> list[Job]:
    """Return what to prune to: the --target sizes, what was ``found``, or entries of --targets."""
    options, save = flags.prune, flags.checkpoint.save
    if found is not None:
        targets = found.targets
    elif options.targets is not None:
        targets = read_targets(options.targets, source)
    else:
        return [Job(target_arch(source, **options.target_sizes()), save, options.plan)]
    return [
        Job(
            target,
            save and str(Path(save) / name),
            options.plan and str(Path(options.plan) / f"{name}.json"),
        )
        for name, target in targets.items()
    ]


def given_plan(job: Job, source: Arch, head_residual: str, origin: Config) -> Plan:
    """Return the plan that is there for ``job``, checked against the model and the flags.

    Raises:
        UserError: naming the file.
    """
    assert job.plan is not None, "a job without a plan's file has none to read"
    plan = load_plan(job.plan)
    check_plan(plan, source)
    check_target(plan.target, source, origin)
    if not any(same_sizes(job.target, arch) for arch in (source, plan.target)):
        raise UserError(
            f"--plan {job.plan} leads to other sizes than the --target flags: remove the file to "
            "plan again, or the flags to use it.",
            USAGE,
        )
    if head_residual not in ("none", plan.head_residual):
        raise UserError(
            f"--plan {job.plan} was made with --head-residual {plan.head_residual}: remove the "
            "file to plan again, or the flag to use it.",
            USAGE,
        )
    return plan


def check_outputs(flags: PruneFlags, jobs: Sequence[Job], found: Found | None) -> None:
    """Refuse now what could not be written after hours of calibration. On one rank.

    Raises:
        UserError: naming the flag.
    """
    for job in jobs:
        if job.save and find(job.save):
            raise UserError(f"--save {job.save}: a checkpoint is there already.", USAGE)
    files = [("--scores", flags.prune.scores), *(("--plan", job.plan) for job in jobs)]
    if found is not None:
        files.append(("--targets", flags.prune.targets))
    folders = [(flag, Path(path).parent) for flag, path in files if path]
    folders += [("--save", Path(job.save)) for job in jobs if job.save]
    for flag, folder in folders:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"{flag}: {there} is no folder that can be written to.", USAGE)


def save_targets(path: str, found: Found) -> None:
    """Write what was found as the file of --targets, aside first. On one rank."""
    with written_aside(path) as aside:
        aside.write_text(found.yaml)
