"""Steps of distillation: FP8 against bf16, and the speed and memory of a pair of useful size."""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from megatron_ext.arch import Arch, forward_flops, num_parameters
from megatron_ext.distillation.losses import KD_LOSS
from megatron_ext.distillation.model import Distillation, DistillationModel
from megatron_ext.model.build import LanguageModel, build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.fp8 import Fp8, of_student, of_teacher
from megatron_ext.training import torch_adam
from megatron_ext.training.step import StepShape, train_step, wrap
from tools.bench.calibration import draw_weights
from tools.gpu.engine import LLAMA, sized
from tools.gpu.setup import Checks, Found, Setup, ceilings, clock, need_engine, seconds_of

FORMATS = {
    "tensorwise": Fp8(fp8_format="hybrid", fp8_recipe="tensorwise"),
    "tensorwise, teacher in bf16": Fp8(
        fp8_format="hybrid", fp8_recipe="tensorwise", teacher_fp8_format="none"
    ),
    "delayed": Fp8(fp8_format="hybrid", fp8_amax_history_len=16, fp8_amax_compute_algo="max"),
}
MOST_APART = 0.1
"""Share of the bf16 loss by which FP8's may differ at the end: a guess, nothing was measured."""


def fp8_checks(setup: Setup) -> Checks:
    """Distil the same pair in bf16 and in FP8."""
    bf16: list[float] = []

    def reference() -> Found:
        bf16[:] = small_run(setup, Fp8())
        return Found(f"kd loss {bf16[0]:.4f} at first, {end_of(bf16):.4f} at the end")

    def in_fp8(fp8: Fp8) -> Found:
        need_engine(setup)
        losses = small_run(setup, fp8)
        gap = end_of(losses) / end_of(bf16) - 1
        return Found(
            f"{end_of(losses):.4f}, {gap:+.2%}", f"{MOST_APART:.0%}", abs(gap) <= MOST_APART
        )

    yield "bf16", reference
    for name, fp8 in FORMATS.items():
        yield f"FP8 {name}", lambda fp8=fp8: in_fp8(fp8)


def end_of(losses: list[float]) -> float:
    """Return the mean of the last fifth."""
    return statistics.mean(losses[-max(1, len(losses) // 5) :])


def small_run(setup: Setup, fp8: Fp8) -> list[float]:
    """Return the losses of 50 steps (4, quickly) of a small pair."""
    teacher = sized(LLAMA, setup)
    student = replace(teacher, ffn_hidden_size=teacher.ffn_hidden_size // 2)
    sizes = (4, 2, 32) if setup.quick else (50, 8, 512)
    steps, batch, seq_length = sizes
    return distil(
        setup, teacher, student, steps=steps, fp8=fp8, batch=batch, seq_length=seq_length
    ).losses


# Llama-3.2's 1B and 3B.
STUDENT = replace(
    LLAMA,
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    padded_vocab_size=128256,
    untie_embeddings_and_output_weights=False,
)
TEACHER = replace(STUDENT, num_layers=28, hidden_size=3072, num_attention_heads=24, kv_channels=128)


def step_checks(setup: Setup) -> Checks:
    """Time a distillation step of a 1B student, and its parts apart."""
    ways = {
        "bf16": (Fp8(), False),
        "bf16, fused output layers": (Fp8(), True),
        "FP8 tensorwise": (FORMATS["tensorwise"], False),
    }
    for name, (fp8, fused) in ways.items():
        yield name, lambda fp8=fp8, fused=fused: speed(setup, fp8, fused=fused)
    yield "bf16, beside its parts", lambda: beside_parts(setup)


def step_sizes(setup: Setup) -> tuple[Arch, Arch, int, int]:
    """Return student, teacher, tokens of a step and steps."""
    seq_length, steps = (32, 2) if setup.quick else (4096, 8)
    return sized(STUDENT, setup), sized(TEACHER, setup), seq_length, steps


def speed(setup: Setup, fp8: Fp8, *, fused: bool) -> Found:
    """Return TFLOP/s, tokens/s and memory of a step, the optimizer's included."""
    if fp8.fp8_format:
        need_engine(setup)
    student, teacher, seq_length, steps = step_sizes(setup)
    found = distil(
        setup, teacher, student, steps=steps, fp8=fp8, batch=1, seq_length=seq_length, fused=fused
    )
    flops = 3 * forward_flops(student, seq_length) + forward_flops(teacher, seq_length)
    rate = flops * seq_length / found.seconds
    share = rate / ceilings(setup.place.device).matmul
    models = f"{num_parameters(student) / 1e9:.2f}B of {num_parameters(teacher) / 1e9:.2f}B"
    return Found(
        f"{models}, {seq_length} tokens: {1000 * found.seconds:.0f} ms, {rate / 1e12:.1f} TFLOP/s "
        f"({share:.0%} of a matrix product's), {seq_length / found.seconds:,.0f} tokens/s, "
        f"{found.peak / 2**30:.1f} GiB"
    )


def beside_parts(setup: Setup) -> Found:
    """Compare a step's forward and backward with the teacher's forward and the student's step.

    The student's own step has the cross entropy that the distillation step leaves out. Without the
    optimizer, which is the same in both.
    """
    student_arch, teacher_arch, seq_length, _ = step_sizes(setup)
    device = setup.place.device
    student, teacher = (
        random_model(setup, arch, {}, seed)
        for seed, arch in enumerate((student_arch, teacher_arch))
    )
    distillation = Distillation(vocab_size=student_arch.vocab_size)
    both = DistillationModel(student[0], teacher[0], distillation, setup.place.groups.tp)
    batch = random_batch(student_arch.vocab_size, 1, seq_length, 1, device)
    inputs = (batch["tokens"], batch["position_ids"], None)

    def teacher_forward() -> None:
        with torch.no_grad():
            teacher[0](*inputs)

    def student_step() -> None:
        student[0].zero_grad(set_to_none=True)
        student[0](*inputs, labels=batch["labels"]).sum().backward()

    def distillation_step() -> None:
        student[0].zero_grad(set_to_none=True)
        losses = both(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"])
        losses[KD_LOSS].sum().backward()

    steps: list[Callable[[], None]] = [teacher_forward, student_step, distillation_step]
    forward, train, together = (1000 * seconds_of(step, device) for step in steps)
    return Found(
        f"{together:.1f} ms against {forward:.1f} (teacher's forward) + {train:.1f} (student's own "
        f"step): {together / (forward + train):.3f} x"
    )


@dataclass(frozen=True)
class Steps:
    """Times, losses and memory of some steps of distillation."""

    losses: list[float]
    seconds: float
    """Median of a step, without the first ones."""
    peak: int
    """Bytes allocated on the GPU at most; 0 on a CPU."""


def distil(
    setup: Setup,
    teacher: Arch,
    student: Arch,
    *,
    steps: int,
    fp8: Fp8,
    batch: int,
    seq_length: int,
    fused: bool = False,
) -> Steps:
    """Distil a random teacher into a random student for some steps, with Adam in bf16."""
    groups, device = setup.place.groups, setup.place.device
    gc.collect()  # the models of the check before
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    own = random_model(setup, student, of_student(fp8), seed=1)
    others = random_model(setup, teacher, of_teacher(fp8), seed=2)
    distillation = Distillation(vocab_size=student.vocab_size, fused_output=fused)
    both = DistillationModel(own[0], others[0], distillation, groups.tp)
    wrapped = wrap([both], DistributedDataParallelConfig(grad_reduce_in_fp32=True), groups)
    config = OptimizerConfig(
        optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16, clip_grad=1.0
    )
    optimizer = get_megatron_optimizer(
        config, wrapped.model, use_gloo_process_groups=False, pg_collection=groups
    )
    torch_adam.fuse(optimizer)
    shape = StepShape(num_microbatches=1, micro_batch_size=batch, seq_length=seq_length)
    losses, seconds = [], []
    for step in range(steps):
        data = random_batch(student.vocab_size, batch, seq_length, step, device)
        start = clock(device)
        found, apply = train_step(wrapped, optimizer, [iter([data])], shape, {KD_LOSS: 1.0})
        apply()
        seconds.append(clock(device) - start)
        losses.append(found[KD_LOSS])
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return Steps(losses, statistics.median(seconds[min(3, steps - 1) :]), peak)


def random_model(
    setup: Setup, arch: Arch, fp8: dict[str, object], seed: int
) -> list[LanguageModel]:
    """Return a model in bf16 whose weights are drawn on the device, billions in a second."""
    device = setup.place.device
    options = ModelOptions(
        params_dtype=torch.bfloat16,
        transformer_impl="transformer_engine" if setup.engine else "local",
        fuse_kernels=device.type == "cuda",
        fp8=fp8,
    )
    chunks = build_model(arch, options, setup.place.groups)
    draw_weights(chunks[0], arch.init_method_std, seed)
    return chunks


def random_batch(
    vocab_size: int, batch: int, seq_length: int, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Return a micro-batch of random tokens on ``device``."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (batch, seq_length), generator=generator)
    positions = torch.arange(seq_length).repeat(batch, 1)
    mask = torch.ones(batch, seq_length)
    data = {"tokens": tokens, "labels": tokens, "position_ids": positions, "loss_mask": mask}
    return {name: x.to(device) for name, x in data.items()}
