"""Rows of Llama and its relatives: attention and norms are alike, MLPs differ."""

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
PHI3_ROWS = {
    **GLM_ROWS,
    **both(f"{ATTENTION}linear_qkv.", FUSED_QKV, f"{HF_LAYER}self_attn.qkv_proj"),
}
MIXTRAL_ROWS = decoder_rows(HF_LAYER, expert_rows(HF_LAYER, "block_sparse_moe", "w1", "w3", "w2"))
QWEN3_MOE_ROWS = decoder_rows(
    HF_LAYER, expert_rows(HF_LAYER, "mlp", "gate_proj", "up_proj", "down_proj")
)
