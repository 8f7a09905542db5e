"""Steps of all programs around a model: join the ranks, choose its options, feed it."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron.core
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_ext.cli.fit import pipeline_layout, virtual_pipeline_size
from megatron_ext.cli.megatron_flags import Parallel
from megatron_ext.cli.parser import dashed, flags_as_dict, settings_of
from megatron_ext.cli.programs import ModelFlags
from megatron_ext.data import datasets
from megatron_ext.model import cuda_graphs
from megatron_ext.model.config import ModelOptions, choose_transformer_impl
from megatron_ext.model.fp8 import Fp8, check_fp8_layers, fp8_settings
from megatron_ext.runtime import platform
from megatron_ext.runtime.collective_errors import check_alike
from megatron_ext.runtime.errors import USAGE, UserError, warn
from megatron_ext.runtime.platform import Platform

NO_GRAPHS = cuda_graphs.Graphs()


def join_ranks(
    flags: ModelFlags, num_layers: int, graphs: cuda_graphs.Graphs = NO_GRAPHS
) -> Platform:
    """Return this rank's place in the layout of ``flags``, for models of ``num_layers``.

    ``graphs``: what will be captured.
    """
    parallel = flags.parallel
    device = platform.choose_device(parallel.device).type
    cuda_graphs.check_machine(graphs, device=device, transformer_impl=None)
    choose_kernels(parallel)
    place = platform.initialize(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(parallel, num_layers),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        device=parallel.device,
        backend=parallel.distributed_backend,
        seed=flags.batch.seed,
        graph_safe_rng=graphs.cuda_graph_impl != "none",
        timeout_minutes=parallel.distributed_timeout_minutes,
    )
    check_alike(_what_runs(flags), "start all ranks with the same command and code", USAGE)
    return place


def _what_runs(flags: ModelFlags) -> dict[str, Any]:
    """Return flags by their typed names, and the versions of the code: the same on all ranks."""
    package = Path(__file__).parent.parent
    code = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.[ch]")]):
        code.update(path.read_bytes())
    return {
        **{dashed(name): value for name, value in flags_as_dict(flags).items()},
        "the code of megatron_ext": code.hexdigest()[:12],
        "the version of torch": torch.__version__,
        "the version of megatron-core": megatron.core.__version__,
    }


def choose_kernels(parallel: Parallel) -> None:
    """Have torch and the libraries below it take the kernels that ``parallel`` asks for."""
    if parallel.deterministic_mode:
        # Read when the libraries start, which they do with the first operation on a GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
        torch.use_deterministic_algorithms(True)
    if parallel.disable_bf16_reduced_precision_matmul:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def model_options(
    flags: ModelFlags,
    place: Platform,
    num_layers: int,
    *,
    has_masks: bool = False,
    **recompute: Any,
) -> ModelOptions:
    """Return how this run holds models of ``num_layers``.

    Args:
        flags: of the run.
        place: this rank.
        num_layers: of the model.
        has_masks: samples say which positions attend to which (--reset-attention-mask).
        recompute: as in ``ModelOptions``.

    Raises:
        UserError: with code ``USAGE``; layers or device do not have what the flags ask for.
    """
    if flags.precision.fp16 and place.device.type == "cpu":
        raise UserError("--fp16 needs a GPU; use --bf16 on a CPU.", USAGE)
    parallel = flags.parallel
    impl = choose_transformer_impl(parallel.transformer_impl, place.device)
    if parallel.moe_grouped_gemm and impl == "local":
        raise UserError("--moe-grouped-gemm needs --transformer-impl transformer_engine.", USAGE)
    uneven = parallel.moe_token_dispatcher_type == "alltoall" and place.groups.tp.size() > 1
    if uneven and torch.distributed.get_backend() == "gloo":
        raise UserError(
            "--moe-token-dispatcher-type alltoall with tensor parallelism needs NCCL: gloo gathers "
            "equal parts only; use allgather.",
            USAGE,
        )
    _check_attention(flags.parallel, impl, has_masks=has_masks)
    output_discarding = {"layernorm", "moe_act"} & set(recompute.get("recompute_modules") or ())
    if output_discarding and impl == "local":
        raise UserError(
            f"--recompute-modules {' '.join(sorted(output_discarding))} needs --transformer-impl "
            "transformer_engine.",
            USAGE,
        )
    half = torch.float16 if flags.precision.fp16 else torch.float32
    pieces = virtual_pipeline_size(parallel, num_layers)
    return ModelOptions(
        params_dtype=torch.bfloat16 if flags.precision.bf16 else half,
        sequence_parallel=parallel.sequence_parallel,
        virtual_pipeline_model_parallel_size=pieces,
        pipeline_model_parallel_layout=pipeline_layout(parallel, num_layers),
        overlap_p2p_comm=bool(pieces) and parallel.overlap_p2p_comm,
        transformer_impl=impl,
        attention_backend=parallel.attention_backend,
        moe_token_dispatcher_type=parallel.moe_token_dispatcher_type,
        moe_grouped_gemm=parallel.moe_grouped_gemm,
        moe_router_dtype=parallel.moe_router_dtype,
        # The compiler that fuses them is not on every machine without a GPU.
        fuse_kernels=place.device.type == "cuda",
        settings=settings_of(parallel),
        recompute=recompute,
    )


def _check_attention(parallel: Parallel, impl: str, *, has_masks: bool) -> None:
    """Say which choices of attention have no effect; refuse those that would be ignored."""
    for name in ("attention_backend", "cp_comm_type"):
        value = getattr(parallel, name)
        if impl == "local" and value != getattr(type(parallel), name):
            warn(f"{dashed(name)} {value}: without effect on local layers.")
    if impl == "transformer_engine" and has_masks:
        raise UserError(
            "--reset-attention-mask: Transformer Engine's causal attention takes no mask; use "
            "--transformer-impl local.",
            USAGE,
        )


def check_fp8(fp8: Fp8, options: ModelOptions) -> None:
    """Refuse FP8 where layers or GPU cannot run it.

    Raises:
        UserError: with code ``USAGE``, with Transformer Engine's reason.
    """
    check_fp8_layers(fp8, options.transformer_impl)
    for typed, settings in fp8_settings(fp8).items():
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        check = {
            "blockwise": FP8GlobalStateManager.is_fp8_block_scaling_available,
            "mxfp8": FP8GlobalStateManager.is_mxfp8_available,
        }.get(settings["fp8_recipe"], FP8GlobalStateManager.is_fp8_available)
        available, reason = check()
        if not available:
            raise UserError(f"{typed}, --fp8-recipe {settings['fp8_recipe']}: {reason}", USAGE)


def batches_of_rank(
    dataset: Dataset,
    place: Platform,
    *,
    micro_batch_size: int,
    num_workers: int,
    consumed_samples: int = 0,
    share: tuple[int, int] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield this rank's micro-batches on its device, cut for context parallelism.

    As ``datasets.batches`` otherwise: tokens, labels, loss_mask, position_ids [b, s / cp], ...
    ``share``: which of how many parts of the samples; by default dealt to data-parallel ranks.
    """
    groups = place.groups
    dp_rank, dp_size = share or (groups.dp.rank(), groups.dp.size())
    for batch in datasets.batches(
        dataset,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        consumed_samples=consumed_samples,
        num_workers=num_workers,
    ):
        shard = datasets.shard_for_context_parallel(batch, groups.cp.rank(), groups.cp.size())
        yield {name: x.to(place.device, non_blocking=True) for name, x in shard.items()}
