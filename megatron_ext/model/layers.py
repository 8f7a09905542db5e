"""Norm and attention in plain torch, which stand in for Transformer Engine's.

Shape letters in this file:
    s  positions on this rank     B  micro-batch             a  query heads on this rank
    S  positions of all ranks     D  channels of a head      g  key/value heads on this rank
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_ext.model.rotary import AttentionOfTwoBases


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dim, after ``config``; [..., C] in and out.

    megatron-core's ``WrappedTorchNorm`` refuses sequence parallelism and zero-centred weights. Here
    the weights are marked ``sequence_parallel``, so that megatron-core adds their gradients over
    the tensor-parallel ranks, and hold gamma - 1 when ``layernorm_zero_centered_gamma`` is set, as
    Transformer Engine's do.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.shape = (hidden_size,)
        self.is_rms = config.normalization == "RMSNorm"
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        options = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
        self.weight = nn.Parameter(torch.full(self.shape, 1.0 - self.offset, **options))
        self.weight.sequence_parallel = config.sequence_parallel
        if not self.is_rms:
            self.bias = nn.Parameter(torch.zeros(self.shape, **options))
            self.bias.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``; torch computes the statistics in float32 for half-precision input."""
        weight = self.weight + self.offset if self.offset else self.weight
        if self.is_rms:
            return F.rms_norm(x, self.shape, weight, self.eps)
        return F.layer_norm(x, self.shape, weight, self.bias, self.eps)


class NormedRowLinear(RowParallelLinear):
    """The last matrix of a sub-layer, without bias, and a norm of its output."""

    def __init__(self, *args: Any, config: TransformerConfig, **options: Any):
        super().__init__(*args, config=config, **options)
        self.post_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return [s, B, H], under sequence parallelism this rank's positions, and no bias."""
        output, _ = super().forward(x)
        return self.post_layernorm(output), None


class Attention(MegatronModule):
    """Core attention on torch's scaled_dot_product_attention: no [s, S] scores are kept.

    Under context parallelism this rank's queries meet the keys and values of all ranks, gathered in
    forward and reduce-scattered in backward (one collective each for keys and for values).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.cp_group = pg_collection.cp
        is_cut = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window = config.window_size[0] if is_cut else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: None = None,
    ) -> Tensor:
        """Return [s, B, a * D] from query [s, B, a, D], key and value [s, B, g, D].

        ``attention_mask`` [B or 1, 1, s, S], true where a query must not look; None means causal.
        """
        s, b = query.shape[:2]
        if self.cp_group.size() > 1:
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)
                for x in (key, value)
            )
        attention_mask = self._hidden_keys(attention_mask, s, query.device)
        inputs = [x.permute(1, 2, 0, 3) for x in (query, key, value)]  # [B, heads, positions, D]
        # Heads differ between tensor-parallel ranks, so their dropout must too.
        with get_cuda_rng_tracker().fork():
            context = F.scaled_dot_product_attention(
                *inputs,
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=self.is_causal and attention_mask is None,
                scale=self.scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return context.permute(2, 0, 1, 3).reshape(s, b, -1)

    def _hidden_keys(self, mask: Tensor | None, s: int, device: torch.device) -> Tensor | None:
        """Return the mask of the gathered keys, in their order; None where causality is all."""
        is_split = self.cp_group.size() > 1
        if not is_split and self.window is None:
            return mask
        own = positions = torch.arange(s, device=device)
        if is_split:
            own = shard_positions(s, self.cp_group, self.cp_group.rank()).to(device)
            positions = gathered_positions(s, self.cp_group).to(device)
            mask = None if mask is None else mask[..., positions]
        distance = own[:, None] - positions  # [s, S]
        if self.window is not None and self.window + 1 < len(positions):
            too_far = (distance > self.window) | (distance < 0)
            return too_far if mask is None else mask | too_far
        if mask is None and self.is_causal and is_split:
            return distance < 0
        return mask


def shard_positions(num_positions: int, cp_group: ProcessGroup, rank: int) -> Tensor:
    """Return the [num_positions] global positions that ``rank`` holds.

    Megatron cuts a sequence into 2 * size chunks and gives rank r the r-th from either end, which
    evens out the work of causal attention.
    """
    half = num_positions // 2
    first, last = rank, 2 * cp_group.size() - 1 - rank
    return torch.cat([torch.arange(half) + first * half, torch.arange(half) + last * half])


def gathered_positions(num_positions: int, cp_group: ProcessGroup) -> Tensor:
    """Return the [S] global positions of what the ranks of ``cp_group`` hold, rank after rank."""
    return torch.cat(
        [shard_positions(num_positions, cp_group, rank) for rank in range(cp_group.size())]
    )


def local_block_spec(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """Return a stage of ``num_layers`` of ``local_layer_spec``."""
    layer = local_layer_spec(config, config.num_moe_experts)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=Norm)


def local_layer_spec(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    """Return megatron-core's local layer with these in place; with None a plain MLP.

    With experts, the norm before the router keeps its name on disk, as in Transformer Engine's
    layers; megatron-core's own local layers write it as ``mlp.linear_fc1.layer_norm_weight``.
    """
    layer = get_gpt_layer_local_spec(
        num_experts=num_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    modules = layer.submodules
    modules.input_layernorm = modules.pre_mlp_layernorm = Norm
    if num_experts is not None:
        del modules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = modules.self_attention.submodules
    attention.core_attention = Attention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    if config.rotary_base_local is not None:
        modules.self_attention.module = AttentionOfTwoBases
    if config.sandwich_norm:
        attention.linear_proj = modules.mlp.keywords["submodules"].linear_fc2 = NormedRowLinear
    return with_multiplier(layer, config.residual_multiplier)


def engine_layer_spec(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    """Return megatron-core's layer of Transformer Engine's modules."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=num_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    if config.rotary_base_local is not None:
        layer.submodules.self_attention.module = AttentionOfTwoBases
    return with_multiplier(layer, config.residual_multiplier)


def with_multiplier(layer: ModuleSpec, multiplier: float) -> ModuleSpec:
    """Return a layer that multiplies what its sub-layers add to the residual stream."""

    def get_multiply_add(training: bool, fused: bool) -> Callable[..., Tensor]:
        dropout_add = get_bias_dropout_add(training, fused)

        def multiply_add(
            output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
        ) -> Tensor:
            parts = [None if part is None else part * multiplier for part in output]
            return dropout_add(tuple(parts), residual, dropout)

        return multiply_add

    if multiplier != 1:
        layer.submodules.self_attn_bda = layer.submodules.mlp_bda = get_multiply_add
    return layer
