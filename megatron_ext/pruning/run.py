"""The run of prune.py, from a checkpoint on disk to pruned ones; its flags are checked."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from megatron_ext.arch import Arch
from megatron_ext.arch.kinds import KINDS
from megatron_ext.checkpoint import checkpoints
from megatron_ext.checkpoint.folder import Checkpoint
from megatron_ext.checkpoint.identity import check_tokenizer, tokenizer_sha256
from megatron_ext.checkpoint.slices import SliceReader
from megatron_ext.cli.fit import check_layout
from megatron_ext.cli.programs import PruneFlags, format_flags
from megatron_ext.convert.fit import export_note
from megatron_ext.data import data_check, datasets
from megatron_ext.data.masked_lm import FRAME
from megatron_ext.model.build import build_model, model_state_dict
from megatron_ext.model.open import open_model, read_again
from megatron_ext.model.options import join_ranks, model_options
from megatron_ext.pruning.aggregation import Aggregation
from megatron_ext.pruning.baselines import magnitude_scores, random_scores
from megatron_ext.pruning.calibrate import Passes, calibrate
from megatron_ext.pruning.depth import score_depth, score_sublayers
from megatron_ext.pruning.iterate import compose, iteration_targets
from megatron_ext.pruning.jobs import (
    Found,
    Job,
    check_outputs,
    check_passes,
    save_targets,
)
from megatron_ext.pruning.plan import Plan, save_plan
from megatron_ext.pruning.planner import make_plan, summary
from megatron_ext.pruning.scores import Scores, depth_method
from megatron_ext.pruning.scores_file import check_scores, load_scores, save_scores
from megatron_ext.pruning.targets import leaves_out_sublayers
from megatron_ext.pruning.trim import fill_trimmed, write_trimmed
from megatron_ext.rehearsal.run_plan import PrunePlan
from megatron_ext.runtime import platform
from megatron_ext.runtime.collective_errors import (
    check_alike,
    locked,
    on_all_ranks,
    on_first_rank,
)
from megatron_ext.runtime.errors import CHECKPOINT, UserError
from megatron_ext.runtime.files import LOCK
from megatron_ext.runtime.platform import Platform


def prune(run_plan: PrunePlan) -> int:
    """Execute the plan of a run; returns the exit code."""
    flags, jobs, found = run_plan.flags, run_plan.jobs, run_plan.found
    source = read_again(run_plan.source.checkpoint, flags.sizes)
    source.tokenizer_files()  # what may not be copied is refused before the calibration
    place = join_ranks(flags, source.arch.num_layers)
    # Before the locks, which make folders. ``make`` looks again: their last holder may have saved.
    on_first_rank(lambda: check_outputs(flags, jobs, found))
    saves = [job.save for job in jobs if job.save]
    with locked({Path(save) / LOCK: f"--save {save}" for save in saves}):
        make(run_plan, source, place)
    platform.shut_down()
    return 0


def make(run_plan: PrunePlan, source: Checkpoint, place: Platform) -> None:
    """Write what the jobs of a plan name, whose folders are locked. Collective."""
    flags, jobs, found = run_plan.flags, run_plan.jobs, run_plan.found
    plans = list(zip(jobs, run_plan.plans, strict=True))
    files = {
        f"the file of --plan {job.plan}": "absent" if plan is None else "there"
        for job, plan in plans
    }
    check_alike(files, "all ranks have to see the same files", CHECKPOINT)
    on_first_rank(lambda: check_outputs(flags, jobs, found))
    say(format_flags(flags))
    if found is not None:
        publish(found, flags.prune.targets)
    elif flags.prune.searches:
        say(f"NOTE: --targets {flags.prune.targets} exists and holds; nothing is searched.")
    if not (flags.checkpoint.save or flags.prune.scores or flags.prune.plan):
        plans = []  # the candidates were all that was asked for
    if flags.checkpoint.verify_integrity:
        checkpoints.verify_integrity(source.folder)
    targets = [job.target for job, _ in plans]
    for reason in sorted({r for target in targets if (r := layout_problem(flags, target))}):
        say(f"NOTE: what is pruned will not load under this layout: {reason}")
    for target in targets:
        if note := export_note(target, source.arch, source.hf_config):
            say(f"NOTE: {note}")
    scores = cache(lambda: get_scores(flags, source, place, targets))
    for job, given in plans:
        plan = given or new_plan(flags, source, place, job, scores())
        if job.save:
            write_trimmed(source, plan, job.save, plan)
        say(f"{job.save or job.plan or flags.prune.scores}\n{summary(plan)}")


def layout_problem(flags: PruneFlags, target: Arch) -> str | None:
    """Return why ``target`` cannot be run under the layout that the source is scored in, or None.

    No error: a plan is the same for any number of ranks, and the student may get a layout of its
    own.
    """
    try:
        check_layout(target, flags.parallel, seq_length=flags.batch.seq_length)
    except UserError as error:
        return str(error)
    return None


def publish(found: Found, path: str | None) -> None:
    """Print the candidates of a search and write them to --targets. Collective."""
    say(found.table)
    if path:
        on_first_rank(lambda: save_targets(path, found))


def new_plan(
    flags: PruneFlags, source: Checkpoint, place: Platform, job: Job, scores: Scores
) -> Plan:
    """Return a plan made from scores, and write it to --plan. Collective."""
    plan = plan_from_scores(flags, source, place, job.target, scores)
    if job.plan:
        on_first_rank(lambda: save_plan(job.plan, plan))
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
            for depth in ("layers", *KINDS):
                vectors.pop(depth, None)  # those of the source hold
            scores = replace(scores, source=plan.target, vectors={**scores.vectors, **vectors})
        part = make_plan(scores, scores.source, step, head_residual=flags.prune.head_residual)
        plan = compose(plan, part) if plan else part
    return plan


def get_scores(
    flags: PruneFlags, source: Checkpoint, place: Platform, targets: Sequence[Arch]
) -> Scores:
    """Return the scores of --scores, or measure them for ``targets`` and write them there.

    Collective.
    """
    sublayers = scores_sublayers(flags, source.arch, targets)
    path, settings = flags.prune.scores, scoring(flags, sublayers=sublayers)
    if _exists(path):
        scores = load_scores(path)
        check_scores(scores, source.arch)
        other = {name: getattr(scores, name) for name in settings}
        if other != settings:
            say(f"NOTE: the settings of --scores {path} hold, {other}; the flags say {settings}.")
        return scores
    order: tuple[tuple[int, ...], ...] = ()
    if flags.prune.importance == "activation":
        vectors, order = measure(flags, passes_over(flags, source, place), targets)
    elif flags.prune.importance == "magnitude":
        reader = on_all_ranks(lambda: SliceReader(source.folder))
        vectors = magnitude_scores(reader, source.arch, place.device, sublayers=sublayers)
    else:
        vectors = random_scores(source.arch, flags.batch.seed, sublayers=sublayers)
    scores = Scores(vectors=vectors, removal_order=order, source=source.arch, **settings)
    if path:
        on_first_rank(lambda: save_scores(path, scores))
    return scores


def scores_sublayers(flags: PruneFlags, source: Arch, targets: Sequence[Arch]) -> bool:
    """Whether sub-layers get scores of their own, beside what calibration measures."""
    if source.is_hybrid:
        return flags.prune.depth_importance != "block"
    return any(leaves_out_sublayers(source, target) for target in targets)


def scoring(flags: PruneFlags, *, sublayers: bool) -> dict[str, Any]:
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
                sublayers=sublayers,
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
    flags: PruneFlags, passes: Passes, targets: Sequence[Arch]
) -> tuple[dict[str, torch.Tensor], tuple[tuple[int, ...], ...]]:
    """Return the scores of every axis and the order in which layers go, from forward passes."""
    options = flags.prune
    vectors = calibrate(passes, aggregation(flags))
    if scores_sublayers(flags, passes.arch, targets):
        return vectors | score_sublayers(passes, options.depth_importance), ()
    if scoring(flags, sublayers=False)["depth"] == "block":
        return vectors, ()  # measured in the same passes
    num_layers = passes.arch.num_layers
    remove = num_layers - min((target.num_layers for target in targets), default=num_layers)
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
    dataset = calibration_data(flags, source, place)
    arch = plan.target if plan else source.arch
    has_masks = flags.data.reset_attention_mask
    options = model_options(flags, place, arch.num_layers, has_masks=has_masks)
    if plan:
        chunks = build_model(arch, options, place.groups)
        state = model_state_dict(chunks)
        on_all_ranks(lambda: fill_trimmed(state, SliceReader(source.folder), plan))
    else:
        chunks = open_model(source, options, place.groups)
    return Passes(
        chunks=chunks,
        arch=arch,
        dataset=dataset,
        place=place,
        num_samples=flags.prune.calibration_samples,
        micro_batch_size=flags.batch.micro_batch_size,
        seq_length=flags.batch.seq_length,
        num_workers=flags.data.num_workers,
    )


def calibration_data(flags: PruneFlags, source: Checkpoint, place: Platform) -> Dataset:
    """Return the calibration samples, checked: as many as asked for, and dealt evenly. Collective.

    Raises:
        UserError: on every rank; a number that cannot be dealt to the ranks, too little data, or
            what ``datasets.build_datasets`` finds.
    """
    num_samples = flags.prune.calibration_samples
    check_passes(flags, source.arch.num_layers, place.groups.dp.size())
    tokenizer = datasets.build_tokenizer(flags.data)
    check_tokenizer(source, tokenizer.vocab_size, tokenizer_sha256(flags.data))
    dataset, _, _ = datasets.build_datasets(
        flags.data,
        seq_length=flags.batch.seq_length,
        num_samples=(num_samples, 0, 0),
        tokenizer=tokenizer,
        seed=flags.batch.seed,
        vocab_size=source.arch.vocab_size,
        masked=source.arch.is_bert,
    )
    on_first_rank(
        lambda: data_check.check_distinct(
            "--calibration-samples",
            flags.data,
            seq_length=flags.batch.seq_length - FRAME * source.arch.is_bert,
            num_samples=num_samples,
        )
    )
    return dataset


def _exists(path: str | None) -> bool:
    """Whether rank 0 finds the file: a late rank would already see what rank 0 writes next."""
    return on_first_rank(lambda: path is not None and Path(path).exists())


def say(text: str) -> None:
    """Print on rank 0."""
    if torch.distributed.get_rank() == 0:
        print(text, flush=True)
