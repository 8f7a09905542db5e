"""Rows and settings that Llama and its relatives share: attention and norms; MLPs differ."""

from collections.abc import Mapping

from megatron_ext.convert.layouts import COPY, FUSED_QKV, GATED, QKV, Layout
from megatron_ext.convert.rows import Row, both

LAYER, ATTENTION, MLP = "decoder.layers.", "decoder.layers.self_attention.", "decoder.layers.mlp."


def decoder_rows(layer: str, mlp: Mapping[str, Row]) -> dict[str, Row]:
    """Return the rows of Llama and its relatives, which differ in the MLP.

    ``layer``: what the names of a layer's weights begin with.
    """
    projections = [f"{layer}self_attn.{name}_proj" for name in "qkv"]
    return {
        **both("embedding.word_embeddings.", COPY, "model.embed_tokens"),
        **both(f"{ATTENTION}linear_qkv.layer_norm_", COPY, f"{layer}input_layernorm"),
        **both(f"{ATTENTION}linear_qkv.", QKV, *projections),
        **both(f"{ATTENTION}q_layernorm.", COPY, f"{layer}self_attn.q_norm"),
        **both(f"{ATTENTION}k_layernorm.", COPY, f"{layer}self_attn.k_norm"),
        **both(f"{ATTENTION}linear_proj.", COPY, f"{layer}self_attn.o_proj"),
        **mlp,
        **both("decoder.final_layernorm.", COPY, "model.norm"),
        **both("output_layer.", COPY, "lm_head"),
    }


def dense_rows(layer: str, fc1: Layout, *fc1_names: str) -> dict[str, Row]:
    """Return the rows of a plain MLP: ``fc1_names`` are those of its first matrix."""
    return {
        **both(f"{MLP}linear_fc1.layer_norm_", COPY, f"{layer}post_attention_layernorm"),
        **both(f"{MLP}linear_fc1.", fc1, *(f"{layer}mlp.{name}" for name in fc1_names)),
        **both(f"{MLP}linear_fc2.", COPY, f"{layer}mlp.down_proj"),
    }


def expert_rows(layer: str, module: str, gate: str, up: str, down: str) -> dict[str, Row]:
    """Return the rows of a mixture of experts; ``gate``, ``up`` and ``down`` are an expert's."""
    expert = f"{layer}{module}.experts.{{expert}}."
    return {
        **both(f"{LAYER}pre_mlp_layernorm.", COPY, f"{layer}post_attention_layernorm"),
        **both(f"{MLP}router.", COPY, f"{layer}{module}.gate"),
        **both(f"{MLP}experts.experts.linear_fc1.", GATED, f"{expert}{gate}", f"{expert}{up}"),
        **both(f"{MLP}experts.experts.linear_fc2.", COPY, f"{expert}{down}"),
    }


HF_LAYER = "model.layers.{layer}."
GATED_ROWS = decoder_rows(HF_LAYER, dense_rows(HF_LAYER, GATED, "gate_proj", "up_proj"))
NEMOTRON_ROWS = decoder_rows(HF_LAYER, dense_rows(HF_LAYER, COPY, "up_proj"))
# [gate ; up] is one tensor there too.
GLM_ROWS = decoder_rows(HF_LAYER, dense_rows(HF_LAYER, COPY, "gate_up_proj"))
GLM4_ROWS = {
    **GLM_ROWS,
    **both(f"{ATTENTION}linear_proj.post_layernorm.", COPY, f"{HF_LAYER}post_self_attn_layernorm"),
    **both(f"{MLP}linear_fc2.post_layernorm.", COPY, f"{HF_LAYER}post_mlp_layernorm"),
}
GEMMA_ROWS = {
    **GATED_ROWS,
    **both(f"{ATTENTION}linear_proj.post_layernorm.", COPY, f"{HF_LAYER}post_attention_layernorm"),
    **both(f"{MLP}linear_fc1.layer_norm_", COPY, f"{HF_LAYER}pre_feedforward_layernorm"),
    **both(f"{MLP}linear_fc2.post_layernorm.", COPY, f"{HF_LAYER}post_feedforward_layernorm"),
}
PHI3_ROWS = {
    **GLM_ROWS,
    **both(f"{ATTENTION}linear_qkv.", FUSED_QKV, f"{HF_LAYER}self_attn.qkv_proj"),
}
MIXTRAL_ROWS = decoder_rows(HF_LAYER, expert_rows(HF_LAYER, "block_sparse_moe", "w1", "w3", "w2"))
QWEN3_MOE_ROWS = decoder_rows(
    HF_LAYER, expert_rows(HF_LAYER, "mlp", "gate_proj", "up_proj", "down_proj")
)

SIZES = {
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "ffn_hidden_size": ("intermediate_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_query_groups": ("num_key_value_heads",),
    "kv_channels": ("head_dim",),
    "max_position_embeddings": ("max_position_embeddings",),
    "norm_epsilon": ("rms_norm_eps",),
    "init_method_std": ("initializer_range",),
    "attention_dropout": ("attention_dropout",),
}
SILU = ("hidden_act", {"silu": {"swiglu": True}})
ROTARY = {"position_embedding_type": "rope", "hidden_dropout": 0.0}
GATED_DECODER = {**ROTARY, "normalization": "RMSNorm", "add_bias_linear": False}
TIED = {"untie_embeddings_and_output_weights": "tie_word_embeddings"}
UNTIED_BY_DEFAULT = {
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}
