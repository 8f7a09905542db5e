"""A run as a plan: what it will do, from its flags and from what checkpoints say of themselves.

A program executes its plan, --dry-run prints it. No collectives: every rank makes the same plan,
from files on storage that all of them share. No model is built and no weight is read; torch is
imported only to count the tokens of some tokenizers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_ext.arch import Arch, forward_flops
from megatron_ext.checkpoint.identity import check_tokenizer, tokenizer_sha256, with_own_tokenizer
from megatron_ext.cli.flag_checks import model_parallel_size
from megatron_ext.cli.megatron_flags import Data, Parallel
from megatron_ext.cli.programs import PruneFlags, TrainFlags, measures, new_arch
from megatron_ext.cli.size_flags import check_source
from megatron_ext.data.vocabulary import absent_files, vocab_size
from megatron_ext.distillation.settings import check_stored_teacher, plan_layouts
from megatron_ext.pruning.iterate import iteration_targets
from megatron_ext.pruning.jobs import Found, Job, check_passes, given_plan, plan_jobs
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.targets import leaves_out_sublayers
from megatron_ext.rehearsal.models import Model, find_student, find_teacher, model_at
from megatron_ext.runtime.errors import CHECKPOINT, UserError
from megatron_ext.training import phase

NEW = "the flags"
"""Where the sizes of a new model stand."""


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """A run of ``pretrain_distill.py``."""

    flags: TrainFlags
    """With the tokenizer, the student's layout and the last iteration that follow from models."""
    world_size: int
    student: Model
    """The model that is trained, alone or beside a teacher."""
    teacher: Model | None
    teacher_parallel: Parallel
    goes_on: bool
    """Optimizer, schedule, generators and counters are the checkpoint's too, not weights alone."""
    iteration: int
    """Steps that were taken before."""
    num_samples: tuple[int, int, int]
    """Samples of the training, validation and test data that are read. Training samples count from
    the beginning of the data, with those that earlier starts have read."""

    @property
    def models(self) -> list[Model]:
        """Student and teacher."""
        return [self.student, *([self.teacher] if self.teacher else [])]

    @property
    def has_weights(self) -> bool:
        """The student's are a checkpoint's; or will be, where a dry run comes before it."""
        return self.student.where != NEW

    @property
    def num_steps(self) -> int:
        """Steps that are left."""
        batch = self.flags.batch
        return 0 if batch.skip_train else max(0, batch.train_iters - self.iteration)

    @property
    def flops(self) -> float:
        """Floating-point operations of the steps that are left, on all ranks together."""
        teacher, batch = self.teacher and self.teacher.arch, self.flags.batch
        tokens = self.num_steps * batch.global_batch_size * batch.seq_length
        return tokens * flops_per_token(self.student.arch, teacher, batch.seq_length)


def plan_training(flags: TrainFlags, world_size: int) -> TrainPlan:
    """Plan a run of ``pretrain_distill.py`` on ``world_size`` ranks.

    Raises:
        UserError: a checkpoint is missing or of other sizes than typed; no tokenizer to count; the
            layout cannot hold the models, FP8 not run them, or the losses not compare them.
    """
    student, goes_on = find_student(flags)
    teacher = find_teacher(flags)
    saved = [model and model.checkpoint for model in (teacher, student)]
    flags = replace(flags, data=with_own_tokenizer(flags.data, *saved))
    count = partial(count_tokens, flags.data, is_dry=flags.dry.dry_run)
    has_weights = student is not None
    student = student or Model(new_arch(flags.sizes, vocab_size(flags.data)), NEW)
    student, teacher = student.with_tokens(count), teacher and teacher.with_tokens(count)
    if goes_on:
        flags = phase.with_steps_left(flags, student.checkpoint)
    flags, teacher_parallel = plan_layouts(
        flags, student.arch, teacher and teacher.arch, has_weights=has_weights
    )
    return TrainPlan(
        flags=flags,
        world_size=world_size,
        student=student,
        teacher=teacher,
        teacher_parallel=teacher_parallel,
        goes_on=goes_on,
        iteration=student.checkpoint.iteration if goes_on else 0,
        num_samples=_samples(flags, student if goes_on else None),
    )


def _samples(flags: TrainFlags, before: Model | None) -> tuple[int, int, int]:
    """Return the samples of ``TrainPlan`` for a run that goes on from ``before``, or begins."""
    batch, log, train = flags.batch, flags.log, 0
    if not batch.skip_train:
        steps, consumed = batch.train_iters, 0
        if before is not None:
            steps = max(0, steps - before.checkpoint.iteration)
            consumed = phase.consumed_data_samples(before.checkpoint.args, flags)
        # A data set of none cannot be built.
        train = max(consumed + steps * batch.global_batch_size, batch.global_batch_size)
    evaluates = log.eval_iters and (log.eval_interval or batch.skip_train)
    valid = batch.global_batch_size * log.eval_iters if evaluates else 0
    return train, valid, valid


def flops_per_token(student: Arch, teacher: Arch | None, seq_length: int) -> float:
    """Return the floating-point operations of a training step for one of its tokens."""
    once = forward_flops(teacher, seq_length) if teacher else 0
    return 3 * forward_flops(student, seq_length) + once


def count_tokens(data: Data, *, is_dry: bool) -> int | None:
    """Return the tokens of the tokenizer; None where a dry run comes before its files."""
    return None if is_dry and absent_files(data) else vocab_size(data)


def check_tokens(plan: TrainPlan, num_tokens: int) -> None:
    """Refuse a tokenizer of ``num_tokens``, or a stored teacher, that is not the models' own.

    Raises:
        UserError: naming the checkpoint or the store.
    """
    check_tokenizers(plan.models, plan.flags.data, num_tokens)
    store = plan.flags.distill.kd_teacher_store
    may_be_absent = plan.flags.dry.dry_run
    if store is not None and (Path(store).exists() or not may_be_absent):
        check_stored_teacher(plan.flags, num_tokens)


def check_tokenizers(models: Sequence[Model], data: Data, num_tokens: int) -> None:
    """Refuse a tokenizer of ``num_tokens`` that is not that of each of ``models``."""
    for model in models:
        if model.checkpoint is not None:
            check_tokenizer(model.checkpoint, num_tokens, tokenizer_sha256(data))
        elif num_tokens > model.arch.padded_vocab_size:
            raise UserError(
                f"--tokenizer-type {data.tokenizer_type}: {num_tokens} tokens, {model.where} has "
                f"{model.arch.padded_vocab_size}: give the model's own tokenizer.",
                CHECKPOINT,
            )


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """A run of ``prune.py``."""

    flags: PruneFlags
    """With the tokenizer that follows from the source."""
    world_size: int
    source: Model
    jobs: tuple[Job, ...]
    plans: tuple[Plan | None, ...]
    """What is kept, for each job whose --plan file is there; else None."""
    found: Found | None
    """The candidates of a search."""
    is_measured: bool
    """Activations are measured: data are read."""

    @property
    def targets(self) -> list[Model]:
        """The models to prune to, and where they go."""
        return [
            Model(plan.target if plan else job.target, job.save or job.plan or NEW)
            for job, plan in zip(self.jobs, self.plans, strict=True)
        ]

    @property
    def num_samples(self) -> tuple[int, int, int]:
        """Samples of the training, validation and test data that are read."""
        return self.flags.prune.calibration_samples * self.is_measured, 0, 0

    @property
    def compares(self) -> bool:
        """Depth is scored by comparing models, in forward passes of its own."""
        return self.is_measured and self.flags.prune.depth_importance != "block"

    @property
    def num_passes(self) -> int:
        """Forward passes over the calibration data: of each iteration one, and those for depth."""
        if not self.is_measured:
            return 0
        prune, source = self.flags.prune, self.source.arch
        targets = [target.arch for target in self.targets]
        if source.is_hybrid or any(leaves_out_sublayers(source, arch) for arch in targets):
            # Block importance of a HybridModel comes with the other scores, of a GPTModel it does
            # not: its hooks are on whole layers.
            depth = self._passes_of(len(source.pattern)) if self.compares else not source.is_hybrid
        elif self.compares or prune.depth_block > 1 or prune.depth_rescore:
            remove = source.num_layers - min(arch.num_layers for arch in targets)
            rounds = range(0, max(remove, 1), prune.depth_block) if prune.depth_rescore else [0]
            blocks = (source.num_layers - gone - prune.depth_block + 1 for gone in rounds)
            depth = sum(map(self._passes_of, blocks))
        else:
            depth = 0
        again = len(iteration_targets(source, targets[0], prune.prune_iterations)) - 1
        return 1 + depth + again

    def _passes_of(self, blocks: int) -> int:
        """Return the passes that score ``blocks``: one without comparing, for the KL one more."""
        importance = self.flags.prune.depth_importance
        return {"block": 1, "loss": blocks, "kl": blocks + 1}[importance]


def plan_pruning(flags: PruneFlags, world_size: int) -> PrunePlan:
    """Plan a run of ``prune.py`` on ``world_size`` ranks. A search is done here, once.

    Raises:
        UserError: the checkpoint is missing or of other sizes than typed; a target does not fit it,
            the layout, the method or an export; samples that the ranks do not share evenly.
    """
    options, dry = flags.checkpoint, flags.dry
    source = model_at(
        "--load",
        options.load,
        options.ckpt_step,
        sizes=flags.sizes,
        is_dry=dry.dry_run,
        config=dry.load_config,
    )
    check_source(flags.sizes, source.arch)
    flags = replace(flags, data=with_own_tokenizer(flags.data, source.checkpoint))
    if flags.data.tokenizer_type:
        source = source.with_tokens(partial(count_tokens, flags.data, is_dry=dry.dry_run))
    jobs, found = plan_jobs(flags, source.arch, source.origin)
    residual, is_measured = flags.prune.head_residual, measures(flags.checkpoint, flags.prune)
    plans = tuple(
        given_plan(job, source.arch, residual, source.origin)
        if job.plan and Path(job.plan).exists()
        else None
        for job in jobs
    )
    if is_measured:
        dp_size = world_size // model_parallel_size(flags.parallel)
        check_passes(flags, source.arch.num_layers, dp_size)
    return PrunePlan(
        flags=flags,
        world_size=world_size,
        source=source,
        jobs=tuple(jobs),
        plans=plans,
        found=found,
        is_measured=is_measured,
    )
