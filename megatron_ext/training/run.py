"""The run of pretrain_distill.py: models, data and training; its flags are checked."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_ext.arch import Arch, num_parameters
from megatron_ext.checkpoint import checkpoints
from megatron_ext.checkpoint.folder import Checkpoint
from megatron_ext.checkpoint.identity import padded_alike
from megatron_ext.cli.method_flags import Distill
from megatron_ext.cli.programs import TrainFlags
from megatron_ext.data import datasets
from megatron_ext.distillation import settings
from megatron_ext.distillation.hidden import NO_HIDDEN_LOSSES, HiddenLosses
from megatron_ext.distillation.losses import KD_LOSS, LM_LOSS, LogitLoss
from megatron_ext.distillation.model import Distillation, DistillationModel
from megatron_ext.distillation.pairs import HiddenStates
from megatron_ext.distillation.stored import StoredDistillationModel, WithStoredTeacher
from megatron_ext.model import cuda_graphs, fp8, tp_overlap
from megatron_ext.model.build import LanguageModel, build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.open import open_model, read_again
from megatron_ext.model.options import batches_of_rank, check_fp8, join_ranks, model_options
from megatron_ext.rehearsal.run_plan import TrainPlan, check_tokens, flops_per_token
from megatron_ext.runtime import platform
from megatron_ext.runtime.collective_errors import on_all_ranks, on_first_rank
from megatron_ext.runtime.files import hold
from megatron_ext.runtime.platform import Platform
from megatron_ext.training import saving, state
from megatron_ext.training.log import Log
from megatron_ext.training.loop import MakeBatches, train, validate
from megatron_ext.training.step import Batch


def pretrain(plan: TrainPlan) -> int:
    """Execute ``plan``; returns the exit code."""
    flags = plan.flags
    if flags.log.logging_level is not None:
        logging.getLogger().setLevel(flags.log.logging_level)
    tokenizer = datasets.build_tokenizer(flags.data)
    check_tokens(plan, tokenizer.vocab_size)
    source, teacher = (
        model and model.checkpoint and read_again(model.checkpoint, flags.sizes)
        for model in (plan.student, plan.teacher)
    )
    place = join_ranks(flags, plan.student.arch.num_layers, flags.graphs)
    if flags.checkpoint.save:
        on_first_rank(lambda: hold(flags.checkpoint.save, "--save"))
    if flags.checkpoint.verify_integrity:
        for each in filter(None, (source, teacher)):
            checkpoints.verify_integrity(each.folder)
    run = build(plan, source, teacher, place)
    code = go(run, plan.num_samples, tokenizer, place)
    platform.shut_down()
    return code


def build(
    plan: TrainPlan, source: Checkpoint | None, teacher: Checkpoint | None, place: Platform
) -> state.Run:
    """Build the models, load them and return the run where it begins. Collective.

    Args:
        plan: of the run.
        source: where the student's weights come from; None for random ones.
        teacher: the other checkpoint, if there is one.
        place: this rank.
    """
    flags, arch = plan.flags, plan.student.arch
    options = options_of_both(flags, arch, place)
    prepare_engine(flags, arch, options, place)
    own_options, teachers = student_options(flags, options), []
    if source is None:
        chunks = build_model(arch, own_options, place.groups, seed=flags.batch.seed)
    elif plan.goes_on:
        chunks = build_model(arch, own_options, place.groups)
    else:
        chunks = open_model(source, own_options, place.groups, arch=arch)
    if teacher is not None:
        alike, others = padded_alike(teacher.arch, arch), teacher_options(plan, options)
        teachers = open_model(teacher, others, place.groups, arch=alike)
    teacher_arch = teacher and teacher.arch
    run = assemble(flags, arch, chunks, place, teacher_arch, teachers, source)
    if plan.goes_on:
        saving.restore(run, source)
    return run


def options_of_both(flags: TrainFlags, arch: Arch, place: Platform) -> ModelOptions:
    """Return how this run holds models, the trained one and its teacher alike."""
    return model_options(
        flags,
        place,
        arch.num_layers,
        has_masks=flags.data.reset_attention_mask,
        recompute_granularity=flags.batch.recompute_granularity,
        recompute_method=flags.batch.recompute_method,
        recompute_num_layers=flags.batch.recompute_num_layers,
        recompute_modules=list(flags.batch.recompute_modules) or None,
    )


def student_options(flags: TrainFlags, options: ModelOptions) -> ModelOptions:
    """Return ``options`` with what the trained model has alone: FP8, CUDA graphs, overlap."""
    return replace(
        options,
        fp8=fp8.of_student(flags.fp8),
        graphs=cuda_graphs.of_student(flags.graphs),
        overlap=tp_overlap.of_student(flags.overlap),
    )


def teacher_options(plan: TrainPlan, options: ModelOptions) -> ModelOptions:
    """Return ``options`` with the teacher's pipeline layout and FP8."""
    layout = plan.teacher_parallel.pipeline_model_parallel_layout
    formats = fp8.of_teacher(plan.flags.fp8)
    return replace(options, pipeline_model_parallel_layout=layout, fp8=formats)


def prepare_engine(flags: TrainFlags, arch: Arch, options: ModelOptions, place: Platform) -> None:
    """Refuse features that layers or GPU lack; start Transformer Engine's buffers. Collective."""
    impl, batch = options.transformer_impl, flags.batch
    check_fp8(flags.fp8, options)
    cuda_graphs.check_machine(flags.graphs, device=place.device.type, transformer_impl=impl)
    tp_overlap.start(
        flags.overlap,
        arch,
        flags.fp8,
        tokens=batch.micro_batch_size * batch.seq_length // place.groups.cp.size(),
        tp_size=place.groups.tp.size(),
        transformer_impl=impl,
    )


def assemble(
    flags: TrainFlags,
    arch: Arch,
    chunks: list[LanguageModel],
    place: Platform,
    teacher: Arch | None = None,
    teachers: Sequence[LanguageModel] = (),
    source: Checkpoint | None = None,
) -> state.Run:
    """Return the run at iteration 0 of models that are there. Collective.

    Args:
        flags: of the run.
        arch: sizes of the model that is trained.
        chunks: this rank's part of it.
        place: this rank.
        teacher: sizes of the other, if there is one.
        teachers: this rank's part of it, a chunk beside each of ``chunks``.
        source: where the weights of ``chunks`` come from; None for random ones.
    """
    modules, objective, eval_losses, hidden = chunks, {LM_LOSS: 1.0}, (LM_LOSS,), NO_HIDDEN_LOSSES
    if flags.distill.kd_teacher_store is not None:
        distillation = losses_of(flags.distill, arch.vocab_size)
        modules = [StoredDistillationModel(s, distillation, place.groups.tp) for s in chunks]
        objective = distillation.objective
    if teacher is not None:
        states = settings.hidden_states(flags, arch, teacher, source)
        distillation = losses_of(flags.distill, arch.vocab_size, states)
        modules = on_all_ranks(
            lambda: [
                DistillationModel(student, frozen, distillation, place.groups.tp)
                for student, frozen in zip(chunks, teachers, strict=True)
            ]
        )
        if states is not None:
            alpha = flags.distill.kd_alpha
            constant = None if alpha == "dynamic" else float(alpha)
            hidden = HiddenLosses([m.hidden for m in modules], place.groups, constant)
        objective, eval_losses = distillation.objective, (KD_LOSS, LM_LOSS)
    return state.make_run(
        flags,
        arch,
        place.groups,
        chunks,
        modules,
        objective=objective,
        eval_losses=eval_losses,
        flops_per_token=flops_per_token(arch, teacher, flags.batch.seq_length),
        hidden=hidden,
        source=source,
    )


def losses_of(
    distill: Distill, vocab_size: int, states: HiddenStates | None = None
) -> Distillation:
    """Return the losses between two models; ``states``: the hidden states that are compared."""
    loss = LogitLoss(
        kind=distill.kd_loss,
        temperature=distill.kd_temperature,
        temperature_squared=distill.kd_temperature_squared,
        beta=distill.kd_jsd_beta,
        top_k=distill.kd_top_k,
        top_k_rest=distill.kd_top_k_rest,
    )
    return Distillation(
        logit_loss=loss,
        loss_weight=distill.kd_loss_weight,
        lm_loss_weight=distill.kd_lm_loss_weight,
        hidden_states=states,
        fused_output=distill.kd_fused_output,
        vocab_size=vocab_size,
    )


def go(
    run: state.Run,
    num_samples: tuple[int, int, int],
    tokenizer: datasets.MegatronTokenizerBase,
    place: Platform,
) -> int:
    """Train and evaluate on the first ``num_samples`` of each split; returns the exit code."""
    flags, batch, num_train = run.flags, run.flags.batch, num_samples[0]
    splits = datasets.build_datasets(
        flags.data,
        seq_length=batch.seq_length,
        num_samples=num_samples,
        tokenizer=tokenizer,
        seed=batch.seed,
        vocab_size=run.arch.vocab_size,
        masked=run.arch.is_bert,
    )
    store = flags.distill.kd_teacher_store
    if store is not None and num_train:
        stored = WithStoredTeacher(splits[0], store)
        on_all_ranks(lambda: stored.check(num_train, place.rank, place.world_size))
        splits = (stored, *splits[1:])
    train_data, valid_data, test_data = (batch_maker(d, flags, place) for d in splits)
    log = Log(flags, flops_per_step=run.flops_per_step, first_iteration=run.counters.iteration)
    log.say(f"{num_parameters(run.arch):,} parameters, beginning at {run.counters.iteration}")
    code = 0
    if valid_data and (batch.skip_train or run.counters.iteration == 0):
        validate(run, valid_data, log, "validation")
    if not batch.skip_train:
        code = train(run, train_batches=train_data, valid_batches=valid_data, log=log)
    if test_data and code == 0:
        validate(run, test_data, log, "test")
    log.close()
    return code


def batch_maker(dataset: object, flags: TrainFlags, place: Platform) -> MakeBatches | None:
    """Return a function that begins this rank's micro-batches at a number of consumed samples."""
    if dataset is None:
        return None

    def make(consumed_samples: int) -> Iterator[Batch]:
        return batches_of_rank(
            dataset,
            place,
            micro_batch_size=flags.batch.micro_batch_size,
            num_workers=flags.data.num_workers,
            consumed_samples=consumed_samples,
        )

    return make
