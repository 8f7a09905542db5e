"""Distillation losses and their gradients: exactness, speed, memory, distance to the bandwidth."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.distillation import native
from megatron_ext.distillation.losses import LogitLoss
from tools.gpu.setup import DTYPES, Checks, Found, Setup, UnavailableError, clock

# Largest error of the loss (absolute), and of the gradient as a share of its norm, which for the
# others is a difference of larger terms; bf16 rounds the gradient.
VALUE = 2e-6
SHARES = {"fp32": 1e-5, "bf16": 4e-3}
# Of one logits tensor: statistics read two, a gradient reads two and writes one; what the mixture
# of jsd needs first reads two more.
UNITS = {"forward-kl": 5, "reverse-kl": 5, "jsd": 7, "mse": 5, "cosine": 5}
WAYS = ("kernels", "in torch", "plain autograd")
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
        for way in WAYS:
            yield (
                f"{name}, {way} bf16: speed, memory",
                lambda name=name, way=way: cost(setup, name, way),
            )


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
    native.kernels = lambda *arguments: None
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
    if way == "plain autograd":
        value = plain(name, leaf, teacher)
        value.sum().backward()
    elif way == "in torch":
        with without_kernels():
            value = LogitLoss(kind=name)(leaf, teacher)
            value.sum().backward()
    else:
        value = LogitLoss(kind=name)(leaf, teacher)
        value.sum().backward()
    return value.detach(), leaf.grad


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
    device, is_cuda = setup.place.device, student.is_cuda
    bandwidth = 2 * student.nbytes / least(student.clone, device)
    run(name, way, student, teacher)  # kernels are compiled
    extra = "-"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(name, way, student, teacher)
        peak = torch.cuda.max_memory_allocated() - before - student.nbytes
        extra = f"{peak / 2**20:,.0f} MiB beside the gradient"
    seconds = least(lambda: run(name, way, student, teacher), device)
    floor = UNITS[name] * student.nbytes / bandwidth
    return Found(
        f"{1000 * seconds:.2f} ms, {seconds / floor:.1f} x the floor of {UNITS[name]} units at "
        f"{bandwidth / 1e9:,.0f} GB/s; {extra}"
    )


def least(action: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """Return the seconds of the fastest of some calls."""
    found = []
    for _ in range(repeats):
        start = clock(device)
        action()
        found.append(clock(device) - start)
    return min(found)
