r"""Prune a checkpoint: calibration data -> scores -> plan -> pruned checkpoint.

    torchrun --nproc-per-node 2 prune.py --load teacher --save pruned --target-hidden-size 3072 \
        --tensor-model-parallel-size 2 --data-path corpus --calibration-samples 1024 ...

--scores and --plan name files: one that exists replaces the steps before it, or else is written.
Several models from the same scores: --targets FILE.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megatron_ext import checkpoint, checkpoint_writer, data, dry_run, platform
from megatron_ext import estimate_report as report
from megatron_ext.arch import Arch, num_parameters
from megatron_ext.checkpoint import Checkpoint
from megatron_ext.errors import USAGE, UserError, run_main
from megatron_ext.flag_checks import model_parallel_size
from megatron_ext.flags import (
    PruneFlags,
    check_experts,
    check_layout,
    check_targets,
    format_flags,
    megatron_command_line,
    parse_prune,
    virtual_pipeline_size,
)
from megatron_ext.model import build_model, model_state_dict
from megatron_ext.platform import Platform
from megatron_ext.pruning.aggregation import Aggregation
from megatron_ext.pruning.baselines import magnitude_scores, random_scores
from megatron_ext.pruning.calibrate import Passes, calibrate
from megatron_ext.pruning.depth import score_depth
from megatron_ext.pruning.iterate import compose, iteration_targets
from megatron_ext.pruning.plan import PRUNABLE, Plan, check_plan, load_plan, save_plan
from megatron_ext.pruning.planner import make_plan, read_targets, target_arch
from megatron_ext.pruning.scores import (
    Scores,
    check_scores,
    depth_method,
    load_scores,
    save_scores,
)
from megatron_ext.pruning.trim import fill_trimmed, trimmed_share
from megatron_ext.slices import SliceReader
from megatron_ext.startup import check_tokenizer, join_ranks, model_options
from megatron_ext.together import on_all_ranks, on_first_rank
from megatron_ext.training.state import restore_weights


@dataclass(frozen=True)
class Job:
    """One model to prune to."""

    target: Arch
    save: str | None
    """Folder of the pruned checkpoint."""
    plan: str | None
    """The plan's file."""


def main() -> int:
    """Run the program; returns its exit code."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    flags = parse_prune(sys.argv[1:], world_size)
    if flags.dry.dry_run:
        return rehearse(flags, flags.dry.world_size or world_size)
    source = checkpoint.read(flags.checkpoint.load, flags.checkpoint.ckpt_step)
    jobs = check_jobs(flags, source.arch)
    place = join_ranks(flags, source.arch.num_layers)
    on_first_rank(lambda: check_outputs(flags.prune.scores, jobs))
    say(format_flags(flags))
    if flags.checkpoint.verify_integrity:
        checkpoint.verify_integrity(source.folder)
    num_layers = min(job.target.num_layers for job in jobs)
    scores = cache(lambda: get_scores(flags, source, place, num_layers))
    for job in jobs:
        plan = get_plan(flags, source, place, job, scores)
        if job.save:
            trim(source, plan, job.save)
        say(f"{job.save or job.plan or flags.prune.scores}\n{summary(plan)}")
    platform.shut_down()
    return 0


def rehearse(flags: PruneFlags, world_size: int) -> int:
    """Check what can be checked without ranks and weights, and print what the run needs."""
    options = flags.checkpoint
    source, where = dry_run.arch_at(
        "--load", options.load, options.ckpt_step, flags.dry.load_config
    )
    jobs = check_jobs(flags, source)
    check_outputs(flags.prune.scores, jobs)
    measures = flags.prune.importance == "activation"
    num_samples = flags.prune.calibration_samples if measures else 0
    if measures:
        check_passes(flags, source.num_layers, world_size // model_parallel_size(flags.parallel))
    absent = dry_run.check_data_there(flags, (source, where), (num_samples, 0, 0))
    targets = [(job.target, job.save or job.plan or "the flags") for job in jobs]
    text, needs = report.of_pruning(flags, (source, where), targets, world_size)
    return dry_run.finish(text, needs, absent, flags.dry.gpu)


def check_jobs(flags: PruneFlags, source: Arch) -> list[Job]:
    """Return what to prune to, checked against the model, the layout and the method."""
    check_layout(source, flags.parallel, seq_length=flags.batch.seq_length)
    check_experts([source], flags.parallel)
    jobs = find_jobs(flags, source)
    check_targets(source, [job.target for job in jobs], flags.prune)
    return jobs


def check_passes(flags: PruneFlags, num_layers: int, data_parallel_size: int) -> None:
    """Refuse a number of samples that the ranks do not share evenly."""
    num_samples, micro_batch_size = flags.prune.calibration_samples, flags.batch.micro_batch_size
    per_pass, pp = (
        micro_batch_size * data_parallel_size,
        flags.parallel.pipeline_model_parallel_size,
    )
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


def find_jobs(flags: PruneFlags, source: Arch) -> list[Job]:
    """Return what to prune to: the --target sizes, or each entry of --targets."""
    options, save = flags.prune, flags.checkpoint.save
    if options.targets is None:
        sizes = {size: getattr(options, f"target_{size}") for size in PRUNABLE}
        return [Job(target_arch(source, **sizes), save, options.plan)]
    return [
        Job(
            target,
            save and str(Path(save) / name),
            options.plan and str(Path(options.plan) / f"{name}.json"),
        )
        for name, target in read_targets(options.targets, source).items()
    ]


def check_outputs(scores: str | None, jobs: list[Job]) -> None:
    """Refuse now what could not be written after hours of calibration. On one rank."""
    for job in jobs:
        if job.save and checkpoint.find(job.save):
            raise UserError(f"--save {job.save}: a checkpoint is there already.", USAGE)
    files = [("--scores", scores), *(("--plan", job.plan) for job in jobs)]
    folders = [(flag, Path(path).parent) for flag, path in files if path]
    folders += [("--save", Path(job.save)) for job in jobs if job.save]
    for flag, folder in folders:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"{flag}: {there} is no folder that can be written to.", USAGE)


def get_plan(
    flags: PruneFlags, source: Checkpoint, place: Platform, job: Job, scores: Callable[[], Scores]
) -> Plan:
    """Return the plan of --plan, or make one from scores and write it there. Collective."""
    path, head_residual = job.plan, flags.prune.head_residual
    if _exists(path):
        plan = load_plan(path)
        check_plan(plan, source.arch)
        if job.target not in (source.arch, plan.target):
            raise UserError(
                f"--plan {path} leads to other sizes than the --target flags: remove the file to "
                "plan again, or the flags to use it.",
                USAGE,
            )
        if head_residual not in ("none", plan.head_residual):
            raise UserError(
                f"--plan {path} was made with --head-residual {plan.head_residual}: remove the "
                "file to plan again, or the flag to use it.",
                USAGE,
            )
        return plan
    plan = plan_from_scores(flags, source, place, job.target, scores())
    if path:
        on_first_rank(lambda: save_plan(path, plan))
    return plan


def plan_from_scores(
    flags: PruneFlags, source: Checkpoint, place: Platform, target: Arch, scores: Scores
) -> Plan:
    """Plan, and with --prune-iterations score what is left and plan again. Collective.

    Returns:
        All plans as one.
    """
    targets = iteration_targets(source.arch, target, flags.prune.prune_iterations)
    for arch in targets[:-1]:
        check_layout(arch, flags.parallel, seq_length=flags.batch.seq_length)
    plan = None
    for step in targets:
        if plan is not None:
            vectors = calibrate(passes_over(flags, source, place, plan), aggregation(flags))
            del vectors["layers"]  # those of the source hold
            scores = replace(scores, source=plan.target, vectors={**scores.vectors, **vectors})
        part = make_plan(scores, scores.source, step, head_residual=flags.prune.head_residual)
        plan = compose(plan, part) if plan else part
    return plan


def get_scores(flags: PruneFlags, source: Checkpoint, place: Platform, num_layers: int) -> Scores:
    """Return the scores of --scores, or measure them and write them there. Collective.

    ``num_layers`` is how many any target keeps at least.
    """
    path, settings = flags.prune.scores, scoring(flags)
    if _exists(path):
        scores = load_scores(path)
        check_scores(scores, source.arch)
        other = {name: getattr(scores, name) for name in settings}
        if other != settings:
            say(f"NOTE: the settings of --scores {path} hold, {other}; the flags say {settings}.")
        return scores
    order: tuple[tuple[int, ...], ...] = ()
    if flags.prune.importance == "activation":
        vectors, order = measure(flags, source, place, num_layers)
    elif flags.prune.importance == "magnitude":
        reader = on_all_ranks(lambda: SliceReader(source.folder))
        vectors = magnitude_scores(reader, source.arch, place.device)
    else:
        vectors = random_scores(source.arch, flags.batch.seed)
    scores = Scores(vectors=vectors, removal_order=order, source=source.arch, **settings)
    if path:
        on_first_rank(lambda: save_scores(path, scores))
    return scores


def scoring(flags: PruneFlags) -> dict[str, Any]:
    """Return how the flags have scores made, in the fields of ``Scores``."""
    importance = flags.prune.importance
    if importance == "activation":
        return {
            "aggregation": str(aggregation(flags)),
            "samples": flags.prune.calibration_samples,
            "seq_length": flags.batch.seq_length,
            "depth": depth_method(
                flags.prune.depth_importance,
                flags.prune.depth_block,
                rescore=flags.prune.depth_rescore,
            ),
        }
    how = f"random,seed={flags.batch.seed}" if importance == "random" else importance
    return {"aggregation": how, "samples": 0, "seq_length": 0, "depth": importance}


def aggregation(flags: PruneFlags) -> Aggregation:
    """Return how activations become scores."""
    options = flags.prune
    return Aggregation(
        batch=options.importance_batch,
        sequence=options.importance_sequence,
        neurons=options.importance_neurons,
        heads=options.importance_heads,
    )


def measure(
    flags: PruneFlags, source: Checkpoint, place: Platform, num_layers: int
) -> tuple[dict[str, torch.Tensor], tuple[tuple[int, ...], ...]]:
    """Return the scores of every axis and the order in which layers go, from forward passes."""
    options = flags.prune
    passes = passes_over(flags, source, place)
    vectors = calibrate(passes, aggregation(flags))
    if scoring(flags)["depth"] == "block":
        return vectors, ()  # measured in the same passes
    remove = source.arch.num_layers - num_layers
    layers, order = score_depth(
        passes,
        options.depth_importance,
        options.depth_block,
        remove=remove if options.depth_rescore else None,
    )
    return vectors | layers, order


def passes_over(
    flags: PruneFlags, source: Checkpoint, place: Platform, plan: Plan | None = None
) -> Passes:
    """Return the source, or what ``plan`` leaves of it, as a model beside its data. Collective."""
    num_samples = flags.prune.calibration_samples
    check_passes(flags, source.arch.num_layers, place.groups.dp.size())
    tokenizer = data.build_tokenizer(flags.data)
    check_tokenizer(source, tokenizer.vocab_size, data.tokenizer_sha256(flags.data))
    arch = plan.target if plan else source.arch
    chunks = build_model(arch, model_options(flags, place, arch.num_layers), place.groups)
    if plan:
        state = model_state_dict(chunks)
        on_all_ranks(lambda: fill_trimmed(state, SliceReader(source.folder), plan))
    else:
        restore_weights(chunks, source)
    dataset, _, _ = data.build_datasets(
        flags.data,
        seq_length=flags.batch.seq_length,
        num_samples=(num_samples, 0, 0),
        tokenizer=tokenizer,
        seed=flags.batch.seed,
    )
    return Passes(
        chunks=chunks,
        arch=arch,
        dataset=dataset,
        place=place,
        num_samples=num_samples,
        micro_batch_size=flags.batch.micro_batch_size,
        seq_length=flags.batch.seq_length,
        num_workers=flags.data.num_workers,
    )


def _exists(path: str | None) -> bool:
    """Whether rank 0 finds the file: a late rank would already see what rank 0 writes next."""
    return on_first_rank(lambda: path is not None and Path(path).exists())


def trim(source: Checkpoint, plan: Plan, save: str) -> None:
    """Cut the weights of ``source`` and publish them as ``save``/release. Collective."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = on_all_ranks(lambda: trimmed_share(SliceReader(source.folder), plan, rank, world_size))
    args = Namespace(**{**source.args, **plan.target.to_args(), "consumed_train_samples": 0})
    checkpoint_writer.save(
        save,
        checkpoint.RELEASE,
        {"model": share, "args": args, "checkpoint_version": 3.0, "iteration": 0},
        files={
            "plan.json": plan.to_json(),
            "megatron_args.sh": megatron_command_line(plan.target) + "\n",
            **source.tokenizer_files(),
        },
    )


def summary(plan: Plan) -> str:
    """Return a table of what was cut."""
    rows = [("", "source", "pruned", "kept")]
    unused = "ffn_hidden_size" if plan.source.num_experts else None
    for name in PRUNABLE:
        before, after = getattr(plan.source, name), getattr(plan.target, name)
        if name == unused or before is None:
            continue
        rows.append((name, f"{before:,}", f"{after:,}", f"{after / before:.0%}"))
    for name, embeddings in (("parameters", True), ("without embeddings", False)):
        before, after = (
            num_parameters(arch, embeddings=embeddings) for arch in (plan.source, plan.target)
        )
        rows.append((name, f"{before:,}", f"{after:,}", f"{after / before:.0%}"))
    return "\n".join(f"{a:36}{b:>18}{c:>18}{d:>8}" for a, b, c, d in rows)


def say(text: str) -> None:
    """Print on rank 0."""
    if torch.distributed.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    run_main(main)
