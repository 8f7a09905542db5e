"""Distillation losses and their gradients: exactness, speed, memory, distance to the bandwidth."""

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.distillation import native
from megatron_ext.distillation.fused import fused_losses
from megatron_ext.distillation.losses import LogitLoss
from tools.gpu.setup import (
    DTYPES,
    Checks,
    Found,
    Setup,
    UnavailableError,
    ceilings,
    seconds_of,
)

# Largest error of the loss (absolute), and of the gradient as a share of its norm, which for the
# others is a difference of larger terms; bf16 rounds the gradient.
VALUE = 2e-6
SHARES = {"fp32": 1e-5, "bf16": 4e-3}
# Of the fused output layers' gradients: of the logits, of the product's sums, and of the result,
# three roundings to bf16.
FUSED = 8e-3
# Of one logits tensor: statistics read two, a gradient reads two and writes one; what the mixture
# of jsd needs first reads two more.
UNITS = {"forward-kl": 5, "reverse-kl": 5, "jsd": 7, "mse": 5, "cosine": 5}
WAYS = ("kernels", "in torch", "plain autograd")
# Other people's losses of the same definition: pip install nvidia-modelopt liger-kernel
PEERS = {
    "forward-kl": ("Model Optimizer", "Liger"),
    "reverse-kl": ("Liger JSD",),
    "jsd": ("Liger JSD",),
}
Loss = Callable[[Tensor, Tensor], Tensor]


def loss_checks(setup: Setup) -> Checks:
    """Compare the kernels, the steps in torch and plain autograd, loss by loss."""
    yield "kernels", lambda: kernels_there(setup)
    for name in UNITS:
        for dtype in DTYPES:
            for way in WAYS[:2]:
                yield (
                    f"{name}, {way} {dtype}: error of loss, gradient",
                    lambda name=name, dtype=dtype, way=way: exactness(setup, name, dtype, way),
                )
        for way in (*WAYS, *PEERS.get(name, ())):
            yield (
                f"{name}, {way} bf16: speed, memory",
                lambda name=name, way=way: cost(setup, name, way),
            )
    yield "forward-kl, fused output layers: error of both gradients", lambda: fused_exactness(setup)
    for way in ("whole logits, kernels", "fused", "Liger fused JSD"):
        yield f"forward-kl with output layers, {way}", lambda way=way: output_layers(setup, way)


def kernels_there(setup: Setup) -> Found:
    """Say which kernels are used: those in Triton on a GPU, those in C on a CPU."""
    student, teacher = logits(setup, 4, torch.bfloat16)
    module = native.kernels(student, teacher, student.size(-1))
    if module is None:
        text = "Triton or a GPU" if setup.place.device.type == "cuda" else "a C compiler"
        raise UnavailableError(f"no kernels without {text}")
    return Found("Triton" if student.is_cuda else "C", "are used", ok=True)


def logits(setup: Setup, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return logits [rows, 1, v] of a student that is near its teacher."""
    columns = 1000 if setup.quick else 128256
    generator = torch.Generator(setup.place.device).manual_seed(1)
    options = {"generator": generator, "device": setup.place.device}
    student = torch.randn(rows, 1, columns, **options).mul_(3)
    teacher = student + 0.3 * torch.randn(rows, 1, columns, **options)
    return student.to(dtype), teacher.to(dtype)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Have losses and their gradients computed in torch."""
    before = native.kernels
    native.kernels = lambda *arguments, **options: None
    try:
        yield
    finally:
        native.kernels = before


def plain(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Return what autograd makes of the definition, in float32 or wider."""
    wide = torch.promote_types(student.dtype, torch.float32)
    s, t = (F.log_softmax(x.to(wide), dim=-1) for x in (student, teacher))
    if name == "mse":
        return (s.exp() - t.exp()).square().sum(-1)
    if name == "cosine":
        return 1 - F.cosine_similarity(s.exp(), t.exp(), dim=-1)
    if name == "jsd":
        m = ((s.exp() + t.exp()) / 2).log()
        return (kl(s, m) + kl(t, m)) / 2
    return kl(t, s) if name == "forward-kl" else kl(s, t)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of logarithms."""
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def run(name: str, way: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of its sum."""
    leaf = student.detach().requires_grad_()
    with without_kernels() if way == "in torch" else nullcontext():
        if way == "plain autograd":
            value = plain(name, leaf, teacher)
        elif way in WAYS:
            value = LogitLoss(kind=name)(leaf, teacher)
        else:
            value = peer(name, way, leaf, teacher)
        value.sum().backward()
    return value.detach(), leaf.grad


def peer(name: str, way: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Return another project's loss, summed over positions or one per position."""
    try:
        if way == "Model Optimizer":
            from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

            return LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=1))(student, teacher)[0]
        from liger_kernel.transformers.jsd import LigerJSD
        from liger_kernel.transformers.kl_div import LigerKLDIVLoss
    except ImportError as error:
        raise UnavailableError(f"{way} ({error})") from error
    # Liger's take logarithms of probabilities, [positions, V].
    s, t = (F.log_softmax(x.flatten(0, 1).float(), dim=-1) for x in (student, teacher))
    if way == "Liger":
        return LigerKLDIVLoss(reduction="sum", log_target=True)(s, t)
    # The mean over positions; its beta is 0 for KL(teacher || student), 1 for the reverse.
    return LigerJSD(beta=0.5 if name == "jsd" else 1.0)(s, t) * s.size(0)


def exactness(setup: Setup, name: str, dtype: str, way: str) -> Found:
    """Compare with the definition in float64."""
    student, teacher = logits(setup, 16 if setup.quick else 256, DTYPES[dtype])
    value, gradient = run(name, way, student, teacher)
    exact, reference = run(name, "plain autograd", student.double(), teacher.double())
    apart = (value.double() - exact).abs().max().item()
    share = ((gradient.double() - reference).norm() / reference.norm()).item()
    result, limit = f"{apart:.1e}, {share:.1e}", f"{VALUE:.0e}, {SHARES[dtype]:.0e}"
    return Found(result, limit, apart <= VALUE and share <= SHARES[dtype])


def cost(setup: Setup, name: str, way: str) -> Found:
    """Time loss and gradient beside a copy of the same logits."""
    student, teacher = logits(setup, 16 if setup.quick else 4096, torch.bfloat16)
    device = setup.place.device
    units = UNITS[name]
    floor = units * student.nbytes / ceilings(device).copy
    action = functools.partial(run, name, way, student, teacher)
    action()  # kernels are compiled
    extra = extra_memory(action, student.nbytes)
    seconds = seconds_of(action, device)
    return Found(
        f"{1000 * seconds:.2f} ms, {seconds / floor:.2f} x the floor of {units} units; {extra}"
    )


def extra_memory(action: Callable[[], object], gradients: int) -> str:
    """Say how much memory ``action`` takes beside its ``gradients`` bytes."""
    if not torch.cuda.is_available():
        return "memory is not counted on a CPU"
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    peak = torch.cuda.max_memory_allocated() - before - gradients
    return f"{peak / 2**20:,.0f} MiB beside gradients"


def output_inputs(setup: Setup, tokens: int, columns: int) -> list[tuple[Tensor, Tensor]]:
    """Return states [tokens, H] and output weight [columns, H], student's and teacher's."""
    device = setup.place.device
    generator = torch.Generator(device).manual_seed(1)
    options = {"generator": generator, "device": device}
    return [
        tuple(torch.randn(rows, size, **options).mul_(0.1).bfloat16() for rows in (tokens, columns))
        for size in ((32, 48) if setup.quick else (2048, 3072))
    ]


def fused_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return forward KL [1, tokens] by this project's fused output layers."""

    def parts(s: Tensor, t: Tensor, _: Tensor) -> dict[str, Tensor]:
        return {"kd": LogitLoss()(s, t).transpose(0, 1)}

    labels = torch.zeros(1, len(student[0]), dtype=torch.int64, device=student[0].device)
    models = (student[0][:, None], student[1], teacher[0][:, None], teacher[1])
    return fused_losses(parts, {"kd": 1.0}, *models, labels, torch.ones_like(labels).float())["kd"]


def fused_exactness(setup: Setup) -> Found:
    """Compare the gradients of states and weight with those of whole logits in float64."""
    student, teacher = output_inputs(setup, *((40, 100) if setup.quick else (2304, 32000)))
    own, wide = (
        [x.detach().to(dtype).requires_grad_() for x in student]
        for dtype in (torch.bfloat16, torch.float64)
    )
    fused_loss(own, teacher).sum().backward()
    logits = [
        (states @ weight.t())[:, None] for states, weight in (wide, [x.double() for x in teacher])
    ]
    plain("forward-kl", *logits).sum().backward()
    shares = [
        ((a.grad.double() - b.grad).norm() / b.grad.norm()).item()
        for a, b in zip(own, wide, strict=True)
    ]
    text = ", ".join(f"{share:.1e}" for share in shares)
    return Found(text, f"{FUSED:.0e}", max(shares) <= FUSED)


def output_layers(setup: Setup, way: str) -> Found:
    """Time both models' output layers with forward KL behind them: loss and gradients."""
    tokens, columns = (16, 1000) if setup.quick else (4096, 128256)
    student, teacher = output_inputs(setup, tokens, columns)

    def loss() -> Tensor:
        if way == "fused":
            return fused_loss(student, teacher)
        if way == "Liger fused JSD":
            try:
                from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
            except ImportError as error:
                raise UnavailableError(f"Liger ({error})") from error
            fused = LigerFusedLinearJSD(jsd_beta=0.0)
            return fused(*student, *teacher, None)
        logits = ((states @ weight.t())[:, None] for states, weight in (student, teacher))
        return LogitLoss()(*logits)

    def step() -> None:
        for leaf in student:
            leaf.grad = None
            leaf.requires_grad_()
        loss().sum().backward()

    step()
    for leaf in student:
        leaf.grad = None
    extra = extra_memory(step, sum(leaf.nbytes for leaf in student))
    seconds = seconds_of(step, setup.place.device, repeats=5)
    # The student's product, its two gradients, and the teacher's product.
    flops = 2 * tokens * columns * (3 * student[0].size(1) + teacher[0].size(1))
    share = flops / seconds / ceilings(setup.place.device).matmul
    return Found(f"{1000 * seconds:.1f} ms, {share:.0%} of the rate of a matrix product; {extra}")
