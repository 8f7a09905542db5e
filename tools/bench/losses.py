"""A loss and its gradient: seconds, extra memory and the distance to the bandwidth floor.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=99999999999 python tools/bench/losses.py [--tp 2]
        [--loss reverse-kl]

Side by side, taking turns, in one run: the loss in C and in torch, Model Optimizer's (forward KL;
pip install nvidia-modelopt==0.47.0 huggingface_hub requests; left out where it is missing), and
output layer and loss together, fused and not. The floor is the time to read both logits and write
one at the speed of a copy measured in the same run. Extra memory is what a step allocates beside
its inputs and the gradient. With --tp, gloo ranks share the vocabulary, a thread each.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.multiprocessing
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_ext.distillation import native
from megatron_ext.distillation.fused import fused_losses
from megatron_ext.distillation.losses import LOSSES, LogitLoss
from megatron_ext.runtime import platform

SHAPES = {"2048 x 32k": (2048, 32768), "512 x 128k": (512, 131072)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Run the ranks; the first prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tp", type=int, default=1, help="ranks that share the vocabulary")
    parser.add_argument("--loss", choices=[*LOSSES, "jsd"], default="forward-kl")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each; the fastest counts")
    parser.add_argument("--hidden-size", type=int, default=1024, help="for the output layer")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (flags, folder), nprocs=flags.tp)


def run_rank(rank: int, flags: argparse.Namespace, folder: str) -> None:
    """Print the table on rank 0."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(flags.tp), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=flags.tp
    )
    place = platform.initialize(tensor_model_parallel_size=flags.tp, device="cpu")
    torch.set_num_threads(1)
    group = place.groups.tp
    if rank == 0:
        print(f"{'logits':12}{'dtype':6}{'loss':28}{'ms':>9}{'x floor':>9}{'extra MiB':>11}")
    for shape, (tokens, vocab) in SHAPES.items():
        for kind, dtype in DTYPES.items():
            torch.manual_seed(rank)
            own = vocab // flags.tp
            student = torch.randn(tokens, 1, own).mul_(3).to(dtype)
            teacher = (student + 0.3 * torch.randn(tokens, 1, own)).to(dtype)
            # Read two and write one, at the speed that a copy reads one and writes one.
            copy = seconds(lambda s=student, t=teacher: s.copy_(t), flags.repeats)
            floor = 1.5 * min(copy)
            own_loss = loss_of(flags.loss, group)
            losses = {"this project, C": own_loss, "this project, torch": own_loss}
            if flags.loss == "forward-kl":
                losses |= model_optimizer(flags.tp)
            rows = measure_losses(losses, student, teacher, flags.repeats)
            del student, teacher
            rows |= measure_output_layers(flags, tokens, own, dtype, losses)
            for name, (least, extra) in rows.items():
                if rank == 0:
                    ratio = "" if "output" in name else f"{least / floor:9.1f}"
                    memory = f"{extra / 2**20:11,.1f}"
                    print(f"{shape:12}{kind:6}{name:28}{1000 * least:9.1f}{ratio:>9}{memory}")


def loss_of(kind: str, group: torch.distributed.ProcessGroup) -> Loss:
    """Return this project's loss."""
    return partial(LogitLoss(kind=kind), tp_group=group)


@contextmanager
def only_torch(name: str) -> Iterator[None]:
    """Leave out the kernels in C for what is called so."""
    kernels = native.kernels
    if name.endswith("torch"):
        native.kernels = lambda *arguments, **options: None
    try:
        yield
    finally:
        native.kernels = kernels


def model_optimizer(tp: int) -> dict[str, Loss]:
    """Return Model Optimizer's loss, if it is installed."""
    try:
        from modelopt.torch.distill.plugins.megatron import LogitsKLLoss
    except ImportError as error:
        print(f"Model Optimizer is left out: {error}", file=sys.stderr)
        return {}
    loss = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=tp))
    return {"Model Optimizer": lambda student, teacher: loss(student, teacher)[0]}


def measure_losses(
    losses: dict[str, Loss], student: Tensor, teacher: Tensor, repeats: int
) -> dict[str, tuple[float, int]]:
    """Return least seconds and extra bytes of forward and backward of each loss, in turns."""
    times: dict[str, list[float]] = {name: [] for name in losses}
    extra = {}
    for turn in range(repeats + 1):
        for name, loss in losses.items():

            def step(loss: Loss = loss) -> None:
                leaf = student.detach().requires_grad_()
                loss(leaf, teacher).sum().backward()

            with only_torch(name):
                if turn == 0:
                    extra[name] = peak_bytes(step) - student.nbytes
                else:
                    times[name] += seconds(step, 1)
    return {name: (min(times[name]), extra[name]) for name in losses}


def measure_output_layers(
    flags: argparse.Namespace,
    tokens: int,
    columns: int,
    dtype: torch.dtype,
    losses: dict[str, Loss],
) -> dict[str, tuple[float, int]]:
    """Return the same of both models' output layers with a loss behind them."""
    states, weight, others, other_weight = (
        torch.randn(*size).mul_(0.1).to(dtype)
        for size in [(tokens, 1, flags.hidden_size), (columns, flags.hidden_size)] * 2
    )
    labels, mask = torch.zeros(1, tokens, dtype=torch.int64), torch.ones(1, tokens)

    def fused() -> Tensor:
        def parts(student: Tensor, teacher: Tensor, _: Tensor) -> dict[str, Tensor]:
            loss = losses["this project, C"](student, teacher)
            return {"kd": loss.transpose(0, 1)}

        models = (states, weight, others, other_weight)
        return fused_losses(parts, {"kd": 1.0}, *models, labels, mask)["kd"]

    def whole(loss: Loss) -> Callable[[], Tensor]:
        return lambda: loss(states @ weight.t(), others @ other_weight.t())

    forwards = {"output layers, fused": fused, "output layers, C": whole(losses["this project, C"])}
    if "Model Optimizer" in losses:
        forwards["output layers, Model Opt."] = whole(losses["Model Optimizer"])
    found = {}
    for name, forward in forwards.items():

        def step(forward: Callable[[], Tensor] = forward) -> None:
            for x in (states, weight):
                x.grad = None
                x.requires_grad_()
            forward().sum().backward()

        states.grad = weight.grad = None
        extra = peak_bytes(step) - states.nbytes - weight.nbytes
        found[name] = (min(seconds(step, max(1, flags.repeats // 2))), extra)
    return found


def seconds(step: Callable[[], object], repeats: int) -> list[float]:
    """Return how long ``step`` takes each time; ranks begin together."""
    found = []
    for _ in range(repeats):
        torch.distributed.barrier()
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return found


def peak_bytes(step: Callable[[], object]) -> int:
    """Return the bytes that torch allocates during ``step`` at most, beside what is there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    now = highest = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest


if __name__ == "__main__":
    main()
