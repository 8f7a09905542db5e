"""A plan and what it costs as text."""

from collections.abc import Mapping
from typing import Any

from megatron_ext.arch import Arch, num_parameters
from megatron_ext.cli.fit import pipeline_layout, virtual_pipeline_size
from megatron_ext.cli.flag_checks import stages
from megatron_ext.cli.megatron_flags import Parallel
from megatron_ext.cli.method_flags import DryRun
from megatron_ext.cli.programs import ModelFlags, TrainFlags
from megatron_ext.rehearsal.cost import WIDE, Layout, Placed, forward_memory, memory
from megatron_ext.rehearsal.models import Model
from megatron_ext.rehearsal.run_plan import PrunePlan, TrainPlan
from megatron_ext.rehearsal.speed import bubble, forward_seconds, step_seconds
from megatron_ext.runtime.errors import USAGE, UserError
from megatron_ext.runtime.gpus import GPUS, Gpu

GB = 10**9
# What helps against the largest item, where it is not more model-parallel ranks.
FIXES = {
    "optimizer": "--use-distributed-optimizer on more data-parallel ranks, or a larger "
    "--tensor-model-parallel-size",
    "activations": "--recompute-granularity full, --context-parallel-size or --sequence-parallel",
    "logits": "--kd-fused-output (with a teacher) or a larger --tensor-model-parallel-size",
}


def placed(arch: Arch, parallel: Parallel) -> Placed:
    """Return the model with the layers of each pipeline stage, as ``parallel`` places them."""
    layout = pipeline_layout(parallel, arch.num_layers)
    pp = parallel.pipeline_model_parallel_size
    if layout is not None:
        return Placed(arch, tuple(stage.count("t") for stage in stages(layout)))
    num_stages = pp * (virtual_pipeline_size(parallel, arch.num_layers) or 1)
    return Placed(arch, (arch.num_layers // num_stages,) * num_stages)


def layout_of(flags: ModelFlags, world_size: int, **more: Any) -> Layout:
    """Return the layout in the flags of a program; ``more`` as in ``Layout``."""
    parallel, precision = flags.parallel, flags.precision
    return Layout(
        world_size=world_size,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        param_bytes=2 if precision.bf16 or precision.fp16 else WIDE,
        micro_batch_size=flags.batch.micro_batch_size,
        seq_length=flags.batch.seq_length,
        **more,
    )


def train_layout(flags: TrainFlags, world_size: int) -> Layout:
    """Return the layout in the flags of ``pretrain_distill.py``."""
    precision, optimizer, batch = flags.precision, flags.optimizer, flags.batch
    teacher_fp8 = flags.fp8.teacher_fp8_format or flags.fp8.fp8_format
    half_gradients = precision.fp16 or precision.grad_reduce_in_bf16
    has_momentum = optimizer.optimizer == "sgd" and optimizer.sgd_momentum > 0
    return layout_of(
        flags,
        world_size,
        use_distributed_optimizer=flags.parallel.use_distributed_optimizer,
        recompute_granularity=batch.recompute_granularity,
        recompute_method=batch.recompute_method,
        recompute_num_layers=batch.recompute_num_layers,
        recompute_modules=batch.recompute_modules,
        grad_bytes=2 if half_gradients else WIDE,
        moments=2 if optimizer.optimizer == "adam" else int(has_momentum),
        global_batch_size=batch.global_batch_size,
        fused_output=flags.distill.kd_fused_output,
        lm_loss=flags.distill.kd_lm_loss_weight > 0,
        fp8=flags.fp8.fp8_format is not None,
        teacher_fp8=teacher_fp8 not in (None, "none"),
        stored_teacher=flags.distill.kd_teacher_store is not None,
    )


def model_line(name: str, model: Model, way: str = "from") -> str:
    """Return one line about a model."""
    arch = model.arch
    experts = f", {arch.num_experts} experts" if arch.num_experts else ""
    mamba = f", Mamba {arch.mamba_num_heads}x{arch.mamba_head_dim}" if arch.mamba_layers else ""
    layers = f"sub-layers {arch.pattern}" if arch.is_hybrid else "layers"
    return (
        f"{name:12}{num_parameters(arch):,} parameters ({num_parameters(arch, embeddings=False):,} "
        f"without embeddings): {arch.num_layers} {layers}, hidden {arch.hidden_size}, ffn "
        f"{arch.span('ffn_hidden_size')}, heads {arch.span('num_attention_heads')}/"
        f"{arch.span('num_query_groups')}"
        f"{experts}{mamba}, vocabulary {arch.padded_vocab_size}; {way} {model.where}"
    )


def layout_line(layout: Layout, parallel: Parallel) -> str:
    """Return one line about the ranks."""
    sizes = [
        ("TP", layout.tensor_model_parallel_size),
        ("PP", layout.pipeline_model_parallel_size),
        ("CP", layout.context_parallel_size),
        ("DP", layout.data_parallel_size),
        ("EP", layout.expert_model_parallel_size),
    ]
    text = " x ".join(f"{name} {size}" for name, size in sizes[:4])
    if layout.expert_model_parallel_size > 1:
        text += f", EP {layout.expert_model_parallel_size}"
    if parallel.pipeline_model_parallel_layout:
        text += f", stages {parallel.pipeline_model_parallel_layout}"
    return f"{'layout':12}{layout.world_size} ranks = {text}"


def memory_table(needs: Mapping[str, int]) -> str:
    """Return bytes by item as lines, in GB of 10^9 bytes."""
    rows = [*needs.items(), ("together", sum(needs.values()))]
    lines = [f"  {name:24}{value / GB:10.2f} GB" for name, value in rows]
    return "\n".join(["memory of the fullest rank", *lines])


def check_memory(needs: Mapping[str, int], gpu: str) -> None:
    """Refuse a run that does not fit."""
    total, limit = sum(needs.values()), GPUS[gpu].memory
    if total > limit:
        largest = max(needs, key=needs.__getitem__)
        fix = FIXES.get(largest, "a larger --tensor- or --pipeline-model-parallel-size")
        raise UserError(
            f"--gpu {gpu} has {limit / GB:.0f} GB, the fullest rank needs {total / GB:.0f}, "
            f"{needs[largest] / GB:.0f} of them {largest}: try {fix}.",
            USAGE,
        )


def time_lines(student: Placed, teacher: Placed | None, layout: Layout, dry: DryRun) -> str:
    """Return the time of a step on the GPU of ``dry``."""
    tokens = layout.global_batch_size * layout.seq_length
    step = step_seconds(student, teacher, layout, GPUS[dry.gpu], dry.mfu)
    idle = bubble(layout, len(student.stages))
    in_fp8 = {"student": layout.fp8, "teacher": layout.teacher_fp8 and teacher is not None}
    named = [name for name, is_fp8 in in_fp8.items() if is_fp8]
    kind = f"FP8 in linear layers of {' and '.join(named)}" if named else "bf16"
    return (
        f"time on {dry.gpu} at {dry.mfu:.0%} of its peak ({kind}), pipeline bubble {idle:.1%}\n"
        f"  {step:.4g} s a step, {tokens / step:,.0f} tokens/s"
    )


def placed_models(plan: TrainPlan) -> tuple[Placed, Placed | None]:
    """Return student and teacher with the layers of each pipeline stage."""
    teacher = plan.teacher and placed(plan.teacher.arch, plan.teacher_parallel)
    return placed(plan.student.arch, plan.flags.parallel), teacher


def of_training(plan: TrainPlan) -> tuple[str, dict[str, int]]:
    """Return what a step of a training run needs, as text, and its memory by item."""
    flags = plan.flags
    layout, models = train_layout(flags, plan.world_size), placed_models(plan)
    needs = memory(*models, layout)
    lines = [model_line("student" if plan.teacher else "model", plan.student)]
    lines += [model_line("teacher", plan.teacher)] if plan.teacher else []
    lines += [
        layout_line(layout, flags.parallel),
        f"{'batch':12}{layout.global_batch_size} samples of {layout.seq_length} tokens = "
        f"{layout.num_microbatches} micro-batches of {layout.micro_batch_size} on each of "
        f"{layout.data_parallel_size} data-parallel ranks",
        memory_table(needs),
        time_lines(*models, layout, flags.dry),
    ]
    return "\n".join(lines), needs


def whole_run(plan: TrainPlan) -> str:
    """Return what all steps of a training run take, what they read and where they are saved."""
    dry, layout = plan.flags.dry, train_layout(plan.flags, plan.world_size)
    steps, tokens = plan.num_steps, layout.global_batch_size * layout.seq_length
    train, valid, test = plan.num_samples
    hours = steps * step_seconds(*placed_models(plan), layout, GPUS[dry.gpu], dry.mfu) / 3600
    lines = [
        f"  {steps:,} steps = {steps * tokens / 1e9:,.1f}B tokens: {hours / 24:,.2f} days, "
        f"{hours * layout.world_size:,.0f} GPU hours, {plan.flops:.3g} FLOPs",
    ] * bool(steps)
    lines += [
        f"{'begins':12}at iteration {plan.iteration}, {begins_with(plan)}",
        f"{'data':12}{train:,} samples for training, {valid:,} for validation, {test:,} for a test",
        f"{'saves':12}{saves(plan)}",
    ]
    return "\n".join(lines)


def begins_with(plan: TrainPlan) -> str:
    """Return what a training run takes from where it begins, in words."""
    if plan.goes_on:
        return f"with all that {plan.student.where} holds"
    return f"with the weights of {plan.student.where}" if plan.has_weights else "with new weights"


def saves(plan: TrainPlan) -> str:
    """Return where a training run saves, and when, in words."""
    options = plan.flags.checkpoint
    if options.save is None or plan.flags.batch.skip_train:
        return "nothing"
    return f"to {options.save} every {options.save_interval} steps and at the end"


def of_pruning(plan: PrunePlan) -> tuple[str, dict[str, int]]:
    """Return what a run of ``prune.py`` needs, as text, and its memory by item.

    Time is that of the forward passes; trimming is reading and writing.
    """
    flags, world_size = plan.flags, plan.world_size
    samples, dry = flags.prune.calibration_samples, flags.dry
    layout = layout_of(flags, world_size, global_batch_size=samples)
    whole, targets = placed(plan.source.arch, flags.parallel), plan.targets
    lines = [model_line("source", plan.source)]
    lines += [model_line("target", target, way="to") for target in targets]
    lines.append(layout_line(layout, flags.parallel))
    largest = max((num_parameters(target.arch) for target in targets), default=0)
    share = largest * layout.param_bytes / world_size
    lines.append(f"{'trim':12}{share / GB:.2f} GB of host memory a rank")
    if not plan.is_measured:
        return "\n".join(lines), {}
    needs = forward_memory(whole, layout, logits=plan.compares)
    seconds = forward_seconds(whole, layout, GPUS[dry.gpu], dry.mfu) * plan.num_passes
    lines += [
        memory_table(needs),
        f"time on {dry.gpu} at {dry.mfu:.0%} of its peak\n  {seconds:.4g} s for "
        f"{plan.num_passes} forward passes over {samples} samples",
    ]
    return "\n".join(lines), needs


def fit_line(needs: Mapping[str, int], gpus: Mapping[str, Gpu]) -> str:
    """Return how much of the memory of each of ``gpus`` is needed."""
    total = sum(needs.values())
    return "share of the memory: " + ", ".join(
        f"{name} {total / gpu.memory:.0%}" for name, gpu in gpus.items()
    )
