"""CUDA or CPU: device, process groups, seeds, and what megatron-core needs to run without CUDA.

megatron-core 0.19.2 names CUDA in its optimizers, schedules and tensor-parallel layers.
``emulate_cuda_on_cpu`` answers those calls from the CPU; nothing else in this project asks which
device it runs on.
"""

import contextlib
import functools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_ext.runtime.errors import USAGE, UserError
from megatron_ext.runtime.heavy import never_compile

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TENSOR_FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")


@dataclass(frozen=True)
class Platform:
    """This rank: its number, its device, its groups."""

    device: torch.device
    groups: ProcessGroupCollection
    """megatron-core's groups: tp, pp, cp, dp, dp_cp, ep, expt_dp, mp, embd, ..."""
    rank: int
    world_size: int


def initialize(
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    device: str | None = None,
    backend: str | None = None,
    seed: int = 1234,
    graph_safe_rng: bool = False,
    timeout_minutes: float = 10,
) -> Platform:
    """Join the other ranks, build megatron-core's groups and seed every generator. Collective.

    Ranks come from torchrun's environment (``slurm`` fills it in for srun); without it, this
    process is the only one. A process group that is already initialised is used as it is.

    Args:
        tensor_model_parallel_size: ranks that share each layer.
        pipeline_model_parallel_size: ranks that share the layers.
        virtual_pipeline_model_parallel_size: model chunks of each pipeline rank; None for one.
        context_parallel_size: ranks that share each sequence. Data parallelism takes what is left.
        expert_model_parallel_size: data and context parallel ranks that share the experts; tensor
            parallelism splits each expert too.
        device: "cuda" or "cpu"; None takes CUDA where there is one.
        backend: "nccl" or "gloo"; None takes the device's own.
        seed: as Megatron-LM's ``--seed``: dropout differs between pipeline stages and tensor ranks.
        graph_safe_rng: keep random state where CUDA graphs can advance it.
        timeout_minutes: of every collective, before it raises instead of waiting.

    Raises:
        UserError: CUDA or NCCL was asked for and is not there; the environment names a part of a
            rank only.
    """
    target = choose_device(device)
    if backend == "nccl" and target.type == "cpu":
        raise UserError(
            "--distributed-backend nccl needs a GPU; leave it out to use gloo on this machine.",
            USAGE,
        )
    _check_rank_variables()
    if target.type == "cpu":
        emulate_cuda_on_cpu()
    # Read when CUDA starts. megatron-core's overlap of communication counts on the order that one
    # connection keeps, and asserts it under sequence parallelism.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if target.type == "cuda":
        torch.cuda.set_device(target)
    _init_process_group(backend or ("nccl" if target.type == "cuda" else "gloo"), timeout_minutes)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    set_seed(seed, groups, graph_safe_rng=graph_safe_rng)
    return Platform(
        device=target,
        groups=groups,
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
    )


def choose_device(device: str | None) -> torch.device:
    """Return this rank's device: the one asked for, or CUDA where there is one, else the CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU; use --device cpu.", USAGE)
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count == 1 and "SLURM_LOCALID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        index = 0  # srun may show each of its tasks a GPU of its own
    if index >= count:
        raise UserError(
            f"LOCAL_RANK {index}: this machine shows {count} GPUs; start no more ranks on it "
            "(--nproc-per-node), or use --device cpu.",
            USAGE,
        )
    return torch.device("cuda", index)


def set_seed(seed: int, groups: ProcessGroupCollection, *, graph_safe_rng: bool) -> None:
    """Seed Python, numpy, torch and megatron-core's tracker as Megatron-LM does.

    ``graph_safe_rng`` takes Transformer Engine's tracker where it is installed.
    """
    seed += 100 * groups.pp.rank()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed,
        te_rng_tracker=graph_safe_rng,
        use_cudagraphable_rng=graph_safe_rng,
        tp_rank=groups.tp.rank(),
        ep_rank=groups.ep.rank(),
        etp_rank=groups.expt_tp.rank(),
        force_reset_rng=True,
    )


def shut_down() -> None:
    """Leave the process groups, all ranks at once. Call it on every rank at the end of a run.

    torchrun ends the others as soon as one rank has ended with a code that is not 0.
    """
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def _check_rank_variables() -> None:
    given = [name for name in RANK_VARIABLES if name in os.environ]
    missing = [name for name in RANK_VARIABLES if name not in os.environ]
    if given and missing and not torch.distributed.is_initialized():
        raise UserError(
            f"{missing[0]} is not set, but {', '.join(given)}: start with torchrun or srun, or set "
            "all of them, or none for one process.",
            USAGE,
        )


def _init_process_group(backend: str, timeout_minutes: float) -> None:
    if torch.distributed.is_initialized():
        return
    timeout = timedelta(minutes=timeout_minutes)
    if any(name in os.environ for name in RANK_VARIABLES):
        try:
            torch.distributed.init_process_group(backend, timeout=timeout)
        except torch.distributed.DistError as error:
            raise _not_joined(timeout_minutes, error) from error
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(
            backend, store=store, rank=0, world_size=1, timeout=timeout
        )


def _not_joined(timeout_minutes: float, error: Exception) -> UserError:
    reason = next(iter(str(error).splitlines()), "") or repr(error)
    return UserError(
        f"ranks did not join at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within "
        f"--distributed-timeout-minutes {timeout_minutes:g}: see what the others said, and whether "
        f"all {os.environ['WORLD_SIZE']} were started ({reason})."
    )


# What megatron-core needs to run without CUDA. Each patch names the place that needs it.


@functools.cache
def emulate_cuda_on_cpu() -> None:
    """Let megatron-core's CUDA calls act on the CPU. Changes torch for this process, once."""
    from megatron.core.tensor_parallel import random as core_random

    cpu = torch.device("cpu")
    # On a machine with a GPU too, writers of checkpoints must not copy on its streams.
    torch.cuda.is_available = lambda: False
    # device=torch.cuda.current_device(): mappings, rotary embeddings, gradient buffers.
    torch.cuda.current_device = lambda: cpu
    # device="cuda": optimizer scale and found_inf, token counts of the schedules.
    for name in TENSOR_FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.to = _on_cpu(torch.Tensor.to)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    # param.type() == "torch.cuda.FloatTensor": optimizers and gradient clipping.
    torch.Tensor.type = _type_as_on_cuda(torch.Tensor.type)
    # Timers, pipeline communication and clean-up.
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    # The generator of the device is the CPU's: the tracker that gives each tensor-parallel rank its
    # own dropout swaps the state of that one.
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed
    core_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    core_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    core_random.CudaRNGStatesTracker.fork = _fork_cpu_generator
    _use_torch_for_optimizers()
    # torch.compile, of squared ReLU and other small functions: it wants a C++ compiler and seconds.
    never_compile()
    # Gradient buffers, which wait for what a graph left in the stream.
    torch.cuda.current_stream = lambda device=None: None
    moe_utils.te_general_gemm = None  # the router's, where Transformer Engine is installed
    # The all-to-all of experts copies its sizes to the host on a stream of its own.
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = object()
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _list_splits


def _use_torch_for_optimizers() -> None:
    """Take torch's optimizers where Transformer Engine or Apex is installed, which need a GPU."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as steps

    optimizer.Adam, optimizer.SGD = torch.optim.AdamW, torch.optim.SGD
    optimizer.USING_PYTORCH_OPTIMIZER = True
    for module in (clip_grads, steps):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(function: Callable) -> Callable:
    """Wrap a tensor factory or ``Tensor.to``: a CUDA device in its arguments becomes the CPU."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)  # the rotary embedding under context parallelism
        args = tuple("cpu" if _is_cuda(arg) else arg for arg in args)
        return function(*args, **kwargs)

    return call


def _type_as_on_cuda(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = function(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return call


def _list_splits(
    self: MoEAlltoAllTokenDispatcher, point: str, tokens_per_expert: torch.Tensor
) -> torch.Tensor:
    """Stand in for the copy to the host, which also makes the sizes a form that gloo takes."""
    for name in ("input_splits", "output_splits"):
        if isinstance(value := getattr(self, name), torch.Tensor):
            setattr(self, name, value.tolist())
    return tokens_per_expert


@contextlib.contextmanager
def _fork_cpu_generator(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """Stand in for ``CudaRNGStatesTracker.fork``, which warns when the CPU's generator moves."""
    before = torch.get_rng_state()
    torch.set_rng_state(self.states_[name])
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(before)
