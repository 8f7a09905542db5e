"""An ``Arch`` and the options of a run as megatron-core's configuration.

``ModelOptions`` is what a run decides and a checkpoint does not: dtype, parallelism, recomputation.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import fast_gelu, squared_relu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.arch import Arch, mamba, per_layer, rotary
from megatron_ext.runtime.errors import USAGE, UserError


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of a run for its models; teacher and student share them."""

    params_dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    virtual_pipeline_model_parallel_size: int | None = None
    pipeline_model_parallel_layout: str | None = None
    overlap_p2p_comm: bool = False
    """With virtual stages only: send activations while computing."""
    transformer_impl: str = "local"
    attention_backend: str = "auto"
    """flash, fused, unfused; of Transformer Engine's attention only."""
    fp8: dict[str, Any] = field(default_factory=dict)
    """megatron-core's settings of FP8 (``model.fp8``); Transformer Engine's layers only."""
    fuse_kernels: bool = False
    """Let megatron-core fuse element-wise operations (torch.compile); for GPUs."""
    moe_token_dispatcher_type: str = "allgather"
    moe_grouped_gemm: bool = False
    """One kernel for the experts of a rank; Transformer Engine's layers only."""
    moe_router_dtype: str | None = None
    """fp32 or fp64, of a router's scores; None for the weights' dtype."""
    settings: dict[str, Any] = field(default_factory=dict)
    """megatron-core's settings that flags stand for, as ``cli.parser.settings_of`` returns them."""
    recompute: dict[str, Any] = field(default_factory=dict)
    """megatron-core's recompute_granularity, recompute_method, recompute_num_layers and
    recompute_modules."""
    graphs: dict[str, Any] = field(default_factory=dict)
    """megatron-core's settings of CUDA graphs (``model.cuda_graphs``)."""
    overlap: dict[str, Any] = field(default_factory=dict)
    """megatron-core's settings of tensor-parallel overlap (``model.tp_overlap``)."""


def choose_transformer_impl(impl: str | None, device: torch.device) -> str:
    """Return "transformer_engine" or "local"; None takes the first on a GPU that has it."""
    available = False
    if device.type == "cuda" and impl != "local":
        try:
            import transformer_engine.pytorch  # noqa: F401

            available = True
        except ImportError:
            available = False
        except Exception as error:  # libraries of another CUDA or torch
            raise UserError(
                f"Transformer Engine is installed and cannot be imported ({error}); "
                "--transformer-impl local does without it.",
                USAGE,
            ) from error
    if impl == "transformer_engine" and not available:
        raise UserError(
            "--transformer-impl transformer_engine needs a GPU with Transformer Engine installed; "
            "use --transformer-impl local.",
            USAGE,
        )
    return impl or ("transformer_engine" if available else "local")


def transformer_config(
    arch: Arch, options: ModelOptions, groups: ProcessGroupCollection
) -> TransformerConfig:
    """Return megatron-core's configuration of ``arch``.

    Losses are sums over tokens, divided once by the token count of the global batch.

    Raises:
        UserError: with code ``USAGE``; megatron-core refuses these settings, in its words, or
            Transformer Engine's layers do not compute ``arch``.
    """
    if options.transformer_impl == "transformer_engine":
        _check_engine(arch, options, groups)
    try:
        return _transformer_config(arch, options, groups)
    except (AssertionError, ValueError) as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise UserError(f"megatron-core refuses this model or layout: {reason}", USAGE) from error


def _check_engine(arch: Arch, options: ModelOptions, groups: ProcessGroupCollection) -> None:
    """Refuse what Transformer Engine's layers do not compute."""
    is_ring = options.settings.get("cp_comm_type", "p2p") == "p2p" and groups.cp.size() > 1
    if is_ring and arch.window is not None:
        raise UserError(
            "--cp-comm-type p2p: Transformer Engine's attention has no windows (--window-size) "
            "under context parallelism that way; use all_gather or a2a.",
            USAGE,
        )
    if arch.sandwich_norm:
        raise UserError(
            "norms behind sub-layers (sandwich_norm) need --transformer-impl local.", USAGE
        )


def _transformer_config(
    arch: Arch, options: ModelOptions, groups: ProcessGroupCollection
) -> TransformerConfig:
    config = _layer_config(arch, options, groups)
    # For ``model.layers``, as of a GPTModel's own settings below.
    for name in ("residual_multiplier", "sandwich_norm", "rotary_base_local"):
        setattr(config, name, getattr(arch, name))
    if arch.position_embedding_type == "yarn":
        # megatron-core reads them of its configuration, which has no fields for them.
        for name in rotary.YARN:
            prefix = "" if name.startswith("yarn_") else "yarn_"
            setattr(config, prefix + name, getattr(arch, name))
    return config


def _layer_config(
    arch: Arch, options: ModelOptions, groups: ProcessGroupCollection
) -> TransformerConfig:
    gelu = fast_gelu if arch.bias_gelu_fusion or arch.geglu else F.gelu
    gate = F.silu if arch.swiglu else gelu
    impl = "local" if arch.is_bert else options.transformer_impl
    has_engine = impl == "transformer_engine"
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        normalization=arch.normalization,
        layernorm_epsilon=arch.norm_epsilon,
        layernorm_zero_centered_gamma=arch.apply_layernorm_1p,
        gated_linear_unit=arch.is_gated,
        activation_func=squared_relu if arch.squared_relu else gate,
        # Not of gelu: megatron-core's fused kernel is the tanh approximation, whoever asks for it.
        bias_activation_fusion=options.fuse_kernels and arch.swiglu,
        bias_dropout_fusion=options.fuse_kernels,
        add_bias_linear=arch.add_bias_linear,
        add_qkv_bias=arch.add_qkv_bias or arch.add_bias_linear,
        qk_layernorm=arch.qk_layernorm,
        softmax_scale=arch.softmax_scale,
        rotary_interleaved=arch.rotary_interleaved,
        window_size=None if arch.window is None else (arch.window, 0),
        **{name: per_layer.switches(arch, name) for name in per_layer.NAMES},
        attention_dropout=arch.attention_dropout,
        hidden_dropout=arch.hidden_dropout,
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=False,
        persist_layer_norm=has_engine,
        apply_rope_fusion=has_engine and arch.position_embedding_type == "rope",
        gradient_accumulation_fusion=False,
        init_method_std=arch.init_method_std,
        # The tensor-parallel layers mark their weights as split when they initialise them.
        init_method=_leave_unset,
        output_layer_init_method=_leave_unset,
        embedding_init_method=_leave_unset,
        calculate_per_token_loss=True,
        params_dtype=options.params_dtype,
        pipeline_dtype=options.params_dtype,
        bf16=options.params_dtype == torch.bfloat16,
        fp16=options.params_dtype == torch.float16,
        tensor_model_parallel_size=groups.tp.size(),
        pipeline_model_parallel_size=groups.pp.size(),
        virtual_pipeline_model_parallel_size=options.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=options.pipeline_model_parallel_layout,
        context_parallel_size=groups.cp.size(),
        attention_backend=AttnBackend[options.attention_backend],
        sequence_parallel=options.sequence_parallel and groups.tp.size() > 1,
        overlap_p2p_comm=options.overlap_p2p_comm,
        batch_p2p_comm=not options.overlap_p2p_comm,
        batch_p2p_sync=False,
        variable_seq_lengths=False,
        transformer_impl=impl,
        use_cpu_initialization=False,
        is_hybrid_model=arch.is_hybrid,
        **(_expert_config(arch, options, groups) if arch.num_experts else {}),
        **(_mamba_config(arch) if arch.mamba_layers else {}),
        **options.settings,
        **options.recompute,
        **options.fp8,
        **options.graphs,
        **options.overlap,
    )


def _expert_config(
    arch: Arch, options: ModelOptions, groups: ProcessGroupCollection
) -> dict[str, Any]:
    """Return the part of megatron-core's configuration that a model without experts refuses."""
    return {
        "num_moe_experts": arch.num_experts,
        "moe_router_topk": arch.moe_router_topk,
        "moe_ffn_hidden_size": arch.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": arch.moe_shared_expert_intermediate_size,
        "moe_router_pre_softmax": arch.moe_router_pre_softmax,
        "moe_router_load_balancing_type": arch.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": arch.moe_aux_loss_coeff,
        "moe_token_dispatcher_type": options.moe_token_dispatcher_type,
        "moe_grouped_gemm": options.moe_grouped_gemm,
        "moe_router_dtype": options.moe_router_dtype,
        "expert_model_parallel_size": groups.ep.size(),
        "expert_tensor_parallel_size": groups.expt_tp.size(),
    }


def _mamba_config(arch: Arch) -> dict[str, Any]:
    return {f.name: getattr(arch, f.name) for f in fields(mamba.Sizes)}


def _leave_unset(weight: Tensor) -> Tensor:
    """Stand in for megatron-core's initialisation, which would depend on the layout."""
    return weight
