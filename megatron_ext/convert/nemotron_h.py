"""Nemotron-H and Nemotron Nano 2: Mamba, attention without positions and MLPs, a layer each.

transformers raises the steps of Mamba to time_step_min, 0.001 as a rule; megatron-core and the code
in NVIDIA's own repositories do not: their limits are time_step_limit, from 0 on. What is written
names a step that none is below, so that transformers computes what megatron-core does.
"""

from megatron_ext.convert.layouts import COPY, QKV
from megatron_ext.convert.rows import Row, both

LAYER = "backbone.layers.{layer}."
ATTENTION, MLP, MAMBA = (f"decoder.layers.{name}." for name in ("self_attention", "mlp", "mixer"))
ROWS = {
    **both("embedding.word_embeddings.", COPY, "backbone.embeddings"),
    **both(f"{ATTENTION}linear_qkv.layer_norm_", COPY, f"{LAYER}norm"),
    **both(f"{ATTENTION}linear_qkv.", QKV, *(f"{LAYER}mixer.{name}_proj" for name in "qkv")),
    **both(f"{ATTENTION}linear_proj.", COPY, f"{LAYER}mixer.o_proj"),
    **both(f"{MLP}linear_fc1.layer_norm_", COPY, f"{LAYER}norm"),
    **both(f"{MLP}linear_fc1.", COPY, f"{LAYER}mixer.up_proj"),
    **both(f"{MLP}linear_fc2.", COPY, f"{LAYER}mixer.down_proj"),
    **both(f"{MAMBA}in_proj.layer_norm_", COPY, f"{LAYER}norm"),
    # z, x, B, C and dt behind each other; x, B and C.
    f"{MAMBA}in_proj.weight": Row(COPY, (f"{LAYER}mixer.in_proj.weight",)),
    **both(f"{MAMBA}conv1d.", COPY, f"{LAYER}mixer.conv1d"),
    **{
        f"{MAMBA}{name}": Row(COPY, (f"{LAYER}mixer.{name}",)) for name in ("dt_bias", "A_log", "D")
    },
    f"{MAMBA}norm.weight": Row(COPY, (f"{LAYER}mixer.norm.weight",)),
    f"{MAMBA}out_proj.weight": Row(COPY, (f"{LAYER}mixer.out_proj.weight",)),
    **both("decoder.final_norm.", COPY, "backbone.norm_f"),
    **both("output_layer.", COPY, "lm_head"),
}
SETTINGS = {
    "sizes": {
        "num_layers": ("num_hidden_layers",),
        "hybrid_layer_pattern": ("hybrid_override_pattern",),
        "hidden_size": ("hidden_size",),
        "ffn_hidden_size": ("intermediate_size",),
        "num_attention_heads": ("num_attention_heads",),
        "num_query_groups": ("num_key_value_heads",),
        "kv_channels": ("head_dim", "attention_head_dim"),
        "max_position_embeddings": ("max_position_embeddings",),
        "init_method_std": ("initializer_range",),
        "attention_dropout": ("attention_dropout",),
        "mamba_num_heads": ("mamba_num_heads",),
        "mamba_head_dim": ("mamba_head_dim",),
        "mamba_num_groups": ("n_groups",),
        "mamba_state_dim": ("ssm_state_size",),
    },
    "activation": ("mlp_hidden_act", {"relu2": {"squared_relu": True}}),
    "fixed": {
        "position_embedding_type": "none",
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": True,
    },
    "only": {
        "tie_word_embeddings": False,  # transformers ties none of this family
        "attention_bias": False,
        "mlp_bias": False,
        "use_bias": False,
        "mamba_proj_bias": False,
        "use_conv_bias": True,
        "conv_kernel": 4,
        "mamba_hidden_act": "silu",
        # megatron-core's norm of gated heads has no other.
        "layer_norm_epsilon": 1e-5,
        "num_nextn_predict_layers": 0,
    },
    "written": {"time_step_min": 1e-9},
    "at_most": {"time_step_min": 1e-3},
    "defaults": {
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "mlp_hidden_act": "relu2",
        "head_dim": 128,
        "num_key_value_heads": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "prefix": "backbone.",
    "has_pattern": True,
}
