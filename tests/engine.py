"""Layers with the shape of Transformer Engine's, on a CPU: what their arithmetic is, torch does.

Names of attributes, tensors and objects are those of Transformer Engine 2.12 in megatron-core
0.19.2: the norms are inside the linear layers behind them, every layer has an ``_extra_state``.
"""

import pickle

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.hybrid import hybrid_block
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import transformer_block
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)

from megatron_ext.model.layers import Attention, Norm

ENGINE = {"transformer_impl": "transformer_engine"}


class ExtraState:
    """Transformer Engine's: empty bytes, or pickled scales once FP8 has run."""

    remembered = None

    def get_extra_state(self):
        if self.remembered is None:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps(self.remembered)), dtype=torch.uint8)

    def set_extra_state(self, state):
        if state is not None and state.numel():
            self.remembered = pickle.loads(state.numpy().tobytes())


class EngineNorm(ExtraState, Norm):
    pass


class RowLinear(ExtraState, RowParallelLinear):
    pass


class ColumnLinear(ExtraState, ColumnParallelLinear):
    pass


class NormLinear(ExtraState, ColumnParallelLinear):
    def __init__(self, input_size, output_size, *, config, **options):
        super().__init__(input_size, output_size, config=config, **options)
        norm = Norm(config, input_size, config.layernorm_epsilon)
        self.layer_norm_weight, self.layer_norm_bias = norm.weight, getattr(norm, "bias", None)
        self.eps, self.normalization = norm.eps, config.normalization
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma

    def forward(self, x):
        weight = self.layer_norm_weight + (1.0 if self.zero_centered_gamma else 0.0)
        if self.normalization == "RMSNorm":
            x = torch.nn.functional.rms_norm(x, weight.shape, weight, self.eps)
        else:
            x = torch.nn.functional.layer_norm(
                x, weight.shape, weight, self.layer_norm_bias, self.eps
            )
        return super().forward(x)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def layer_spec(num_experts=None, moe_grouped_gemm=False, qk_layernorm=False):
    """Stand in for ``get_gpt_layer_with_transformer_engine_spec``."""
    assert not moe_grouped_gemm
    spec = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=num_experts, qk_layernorm=qk_layernorm
    )
    layer = spec.submodules
    layer.sharded_state_dict_keys_map = {}
    layer.input_layernorm = IdentityOp
    attention = layer.self_attention.submodules
    attention.linear_qkv, attention.linear_proj = NormLinear, RowLinear
    attention.core_attention = Attention
    if qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = EngineNorm
    if num_experts is None:
        layer.pre_mlp_layernorm = IdentityOp
        mlp = layer.mlp.keywords["submodules"]
        mlp.linear_fc1, mlp.linear_fc2 = NormLinear, RowLinear
        return spec
    layer.pre_mlp_layernorm = EngineNorm
    layer_of_experts = layer.mlp.keywords["submodules"]
    for experts in (layer_of_experts.experts, layer_of_experts.shared_experts):
        mlp = experts.keywords["submodules"]
        mlp.linear_fc1, mlp.linear_fc2 = ColumnLinear, RowLinear
    return spec


def stand_in():
    """Build these layers in this process where Transformer Engine's are asked for."""
    gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec = layer_spec
    transformer_engine.TELayerNormColumnParallelLinear = NormLinear
    transformer_engine.TERowParallelLinear = RowLinear
    transformer_block.LayerNormImpl = hybrid_block.TENorm = EngineNorm
    rotate = rope_utils._apply_rotary_pos_emb_bshd
    rope_utils.fused_apply_rotary_pos_emb = lambda t, freqs, interleaved=False: rotate(
        t, freqs, rotary_interleaved=interleaved
    )
