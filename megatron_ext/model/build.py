"""An ``Arch`` as one of megatron-core's models on this rank; no layout changes its initial weights.

``ModelOptions`` is what a run decides and a checkpoint does not: dtype, parallelism, recomputation.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import fast_gelu, squared_relu
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    set_defaults_if_not_set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.arch import Arch, mamba, names_on_disk, per_layer, rotary, weights
from megatron_ext.checkpoint.checkpoints import sharded_tensors
from megatron_ext.model.bert import MaskedLanguageModel, build_bert
from megatron_ext.model.cuda_graphs import make_own_tables
from megatron_ext.model.hybrid import HybridLanguageModel, build_hybrid
from megatron_ext.model.layers import engine_layer_spec, local_block_spec
from megatron_ext.model.output import VocabularyOutput
from megatron_ext.model.rotary import TwoBases
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


class LanguageModel(VocabularyOutput, GPTModel):
    """megatron-core's GPT model whose logits stay as they are computed.

    Without labels ``forward`` returns logits [s, b, v] (s positions, v the columns of this
    tensor-parallel rank), where GPTModel copies them into [b, s, v]. With labels it returns the
    language-model loss per token, [b, s].
    """

    def _postprocess(
        self, hidden_states: Tensor, *, labels: Tensor | None = None, **inputs: object
    ) -> Tensor:
        if self.post_process:
            hidden_states = self.output_input(hidden_states)
        if labels is not None or not self.post_process:
            return super()._postprocess(hidden_states, labels=labels, **inputs)
        if self.leaves_out_output_layer:
            return hidden_states
        return self.output_layer(hidden_states, weight=self.output_weight())[0]


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


def build_model(
    arch: Arch,
    options: ModelOptions,
    groups: ProcessGroupCollection,
    *,
    seed: int | None = None,
) -> list[LanguageModel]:
    """Return this rank's part of the model: one module per virtual pipeline stage.

    Args:
        arch: sizes of the whole model.
        options: dtype and parallelism.
        groups: megatron-core's process groups (tp, pp, cp, ... as of ``platform.initialize``).
        seed: draw initial weights from it; None leaves them unset, for a checkpoint to fill.
    """
    config = transformer_config(arch, options, groups)
    num_chunks = options.virtual_pipeline_model_parallel_size or 1
    chunks = [_build_chunk(arch, config, groups, chunk, num_chunks) for chunk in range(num_chunks)]
    if seed is not None:
        initialize_weights(chunks, arch, seed)
    return chunks


def _build_gpt(
    arch: Arch, config: TransformerConfig, num_layers: int, **place: Any
) -> LanguageModel:
    if config.transformer_impl == "transformer_engine":
        spec = engine_layer_spec(config, config.num_moe_experts)
    else:
        spec = local_block_spec(config, num_layers)
    rotation = {
        "rotary_percent": arch.rotary_percent,
        "rotary_base": arch.rotary_base,
        "seq_len_interpolation_factor": arch.rotary_seq_len_interpolation_factor,
        "rope_scaling": arch.use_rope_scaling,
        "rope_scaling_factor": arch.rope_scaling_factor,
    }
    model = LanguageModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=arch.padded_vocab_size,
        max_sequence_length=arch.max_position_embeddings,
        share_embeddings_and_output_weights=not arch.untie_embeddings_and_output_weights,
        position_embedding_type=arch.position_embedding_type,
        **rotation,
        **place,
    )
    if arch.rotary_base_local is not None:
        model.rotary_pos_emb = TwoBases(
            arch.rotary_base_local,
            kv_channels=arch.kv_channels,
            rotary_interleaved=arch.rotary_interleaved,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=place["pg_collection"].cp,
            **rotation,
        )
    return model


def _build_chunk(
    arch: Arch,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    chunk: int,
    num_chunks: int,
) -> LanguageModel | HybridLanguageModel | MaskedLanguageModel:
    vp_stage = chunk if num_chunks > 1 else None
    num_layers = get_num_layers_to_build(config, vp_stage, groups.pp.rank())
    place = {
        "pre_process": groups.pp.rank() == 0 and chunk == 0,
        "post_process": groups.pp.rank() == groups.pp.size() - 1 and chunk == num_chunks - 1,
        "pg_collection": groups,
        "vp_stage": vp_stage,
    }
    if arch.is_bert:
        model = build_bert(arch, config, num_layers, **place)
    elif arch.is_hybrid:
        model = build_hybrid(arch, config, num_chunks, **place)
    else:
        model = _build_gpt(arch, config, num_layers, **place)
    if config.cuda_graph_impl == "local":
        make_own_tables(model)
    model.num_tokens, model.logits_scaling = arch.vocab_size, arch.logits_scaling
    if place["pre_process"] and arch.embedding_multiplier != 1:
        # Rounded to the weights' dtype first, as transformers does.
        model.embedding.register_forward_hook(
            lambda _, __, y: y * y.new_tensor(arch.embedding_multiplier)
        )
    for name, parameter in model.named_parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        if ".mlp.experts." in name:
            # megatron-core gives experts an optimizer of their own under expert parallelism only.
            # Always, so that optimizer state has one form on disk.
            parameter.allreduce = False
    # megatron-core makes tables of positions and BERT's head in float32, whatever the others are.
    return model.to(torch.cuda.current_device(), config.params_dtype)


def model_state_dict(chunks: list[MegatronModule]) -> ShardedStateDict:
    """Return what this rank holds as megatron-core's sharded tensors, one dict per chunk.

    Keys are ``model`` or ``model0``, ``model1``, ... as Megatron-LM names them.
    """
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict()}
    return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}


@torch.no_grad()
def initialize_weights(chunks: list[LanguageModel], arch: Arch, seed: int) -> None:
    """Draw every weight from its own generator, seeded by (seed, name, layer, expert).

    No collectives. Of a HybridModel, the layer is the sub-layer's number within its kind: with the
    same seed, a pattern of whole layers begins as a GPTModel does.

    Each rank draws the whole tensor and keeps its shard, so that a seed gives the same model under
    every layout. (megatron-core draws from one generator per tensor-parallel rank.)

    Raises:
        ValueError: the model has a weight without a row in ``arch.weights``.
    """
    rows = {
        key: (weight, str(number) if arch.is_hybrid else "")
        for weight in weights(arch)
        for number, key in enumerate(names_on_disk(weight, arch))
    }
    std = arch.init_method_std
    stds = {"normal": std, "scaled": std / len(arch.pattern) ** 0.5}
    for shard in sharded_tensors(model_state_dict(chunks)):
        if shard.key not in rows:
            raise ValueError(f"{shard.key} has no row in the table of weights (megatron_ext/arch).")
        weight, number = rows[shard.key]
        init = weight.init
        if init in ("ones", "zeros"):
            shard.data.fill_(float(init == "ones"))
            continue
        if init in DRAWN:
            uniform = draw(shard, seed, None, (weight.key, number))
            shard.data.copy_(DRAWN[init](uniform))
            continue
        shard.data.copy_(draw(shard, seed, stds[init], (weight.key, number)))


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))


def _steps(uniform: Tensor) -> Tensor:
    """Return biases of steps that are spread from 0.001 to 0.1 by their logarithm."""
    return _inverse_softplus(torch.exp(math.log(1e-3) + uniform * math.log(100)))


# What Mamba's parameters are made of, numbers from [0, 1), as megatron-core has it: a convolution's
# are from +- 1 / sqrt(taps), decays from 1 to 16.
DRAWN: dict[str, Callable[[Tensor], Tensor]] = {
    "conv": lambda uniform: (2 * uniform - 1) / mamba.TAPS**0.5,
    "step": _steps,
    "decay": lambda uniform: torch.log(1 + 15 * uniform),
}


def draw(
    shard: ShardedTensor, seed: int, std: float | None, name: tuple[str, str] | None = None
) -> Tensor:
    """Return this rank's share of a tensor of normal numbers, which is drawn whole. No collectives.

    Without ``std`` of numbers from [0, 1), float32.

    The numbers follow from the seed and the shard's name, layer and expert; or from ``name``, the
    name and the layer of a HybridModel's weight as a GPTModel would have them.
    """
    axes = shard.prepend_axis_num
    key, number = name or (shard.key, "")
    which = " ".join([number, *map(str, shard.global_offset[:axes])]).strip() or "0"
    digest = hashlib.sha256(f"{seed} {key} {which}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    whole = torch.empty(shard.global_shape[axes:])
    if std is None:
        whole.uniform_(generator=generator)
    else:
        whole.normal_(std=std, generator=generator)
    place = tuple(
        slice(start, start + length)
        for start, length in zip(shard.global_offset[axes:], shard.local_shape, strict=True)
    )
    return whole[place]
