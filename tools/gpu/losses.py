"""The distillation loss and its gradient: exactness, speed, memory, distance to the bandwidth."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.distillation import native
from megatron_ext.distillation.losses import vocab_parallel_kl
from tools.gpu.setup import DTYPES, Checks, Found, Setup, UnavailableError, clock

# Largest errors of loss (absolute, nats) and gradient (share of its norm): bf16 rounds the latter.
LIMITS = {"fp32": (2e-6, 1e-5), "bf16": (2e-6, 4e-3)}
UNITS = 5  # of one logits tensor: two read in forward, two read and one written in backward
Loss = Callable[[Tensor, Tensor], Tensor]


def loss_checks(setup: Setup) -> Checks:
    """Compare the kernels, the steps in torch and plain autograd."""
    yield "kernels", lambda: kernels_there(setup)
    for dtype in DTYPES:
        for name, loss in (("kernels", vocab_parallel_kl), ("in torch", in_torch)):
            yield (
                f"{name} {dtype}: error of loss, gradient",
                lambda dtype=dtype, loss=loss: exactness(setup, dtype, loss),
            )
    ways = {"kernels": vocab_parallel_kl, "in torch": in_torch, "plain autograd": plain}
    for name, loss in ways.items():
        yield f"{name} bf16: speed, memory", lambda loss=loss: cost(setup, loss)


def kernels_there(setup: Setup) -> Found:
    """Say which kernels are used: those in Triton on a GPU, those in C on a CPU."""
    student, teacher = logits(setup, 4, torch.bfloat16)
    if native.kl_stats(student, teacher, 1.0, student.size(-1)) is None:
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


def in_torch(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss without kernels of our own."""
    with without_kernels():
        return vocab_parallel_kl(student, teacher)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Let the kernels decline, in backward too: its end is the end of ``step``."""
    before = native._fits
    native._fits = lambda *tensors: False
    try:
        yield
    finally:
        native._fits = before


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """Return what autograd makes of the definition, in float32."""
    p, q = (F.log_softmax(x.float(), dim=-1) for x in (teacher, student))
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def run(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of its sum."""
    leaf = student.detach().requires_grad_()
    value = loss(leaf, teacher)
    if loss is in_torch:
        with without_kernels():
            value.sum().backward()
    else:
        value.sum().backward()
    return value.detach(), leaf.grad


def exactness(setup: Setup, dtype: str, loss: Loss) -> Found:
    """Compare with the definition in float64."""
    student, teacher = logits(setup, 16 if setup.quick else 256, DTYPES[dtype])
    value, gradient = run(loss, student, teacher)
    s, t = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    exact = (t.exp() * (t - s)).sum(-1)
    reference = s.exp() - t.exp()
    apart = (value.double() - exact).abs().max().item()
    share = ((gradient.double() - reference).norm() / reference.norm()).item()
    most, most_share = LIMITS[dtype]
    result, limit = f"{apart:.1e}, {share:.1e}", f"{most:.0e}, {most_share:.0e}"
    return Found(result, limit, apart <= most and share <= most_share)


def cost(setup: Setup, loss: Loss) -> Found:
    """Time loss and gradient beside a copy of the same logits."""
    student, teacher = logits(setup, 16 if setup.quick else 4096, torch.bfloat16)
    device, is_cuda = setup.place.device, student.is_cuda
    bandwidth = 2 * student.nbytes / least(student.clone, device)
    run(loss, student, teacher)  # kernels are compiled
    extra = "-"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(loss, student, teacher)
        peak = torch.cuda.max_memory_allocated() - before - student.nbytes
        extra = f"{peak / 2**20:,.0f} MiB beside the gradient"
    seconds = least(lambda: run(loss, student, teacher), device)
    floor = UNITS * student.nbytes / bandwidth
    return Found(
        f"{1000 * seconds:.2f} ms, {seconds / floor:.1f} x the floor of {UNITS} units at "
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
