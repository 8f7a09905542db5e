"""Families of Hugging Face models as tables: their weights and their config.json, both ways.

A row says under which names and in which layout a weight of ``arch.weights`` stands in the family's
files. Rows of weights that a model does not have (biases, a head of its own) are not used. A new
family is a new entry of ``FAMILIES``.
"""

from typing import Any

from megatron_ext.convert import bert, gemma, nemotron_h
from megatron_ext.convert.decoder import (
    ATTENTION,
    GATED_DECODER,
    GATED_ROWS,
    GEMMA_ROWS,
    GLM4_ROWS,
    GLM_ROWS,
    MIXTRAL_ROWS,
    MLP,
    NEMOTRON_ROWS,
    PHI3_ROWS,
    QWEN3_MOE_ROWS,
    ROTARY,
    SILU,
    SIZES,
    TIED,
    UNTIED_BY_DEFAULT,
)
from megatron_ext.convert.family import Family
from megatron_ext.convert.layouts import COPY, TRANSPOSED, TRANSPOSED_QKV
from megatron_ext.convert.rotary import MINISTRAL_3_ROPE
from megatron_ext.convert.rows import both

GPT2_LAYER = "transformer.h.{layer}."
GPT2_ROWS = {
    **both("embedding.word_embeddings.", COPY, "transformer.wte"),
    **both("embedding.position_embeddings.", COPY, "transformer.wpe"),
    **both(f"{ATTENTION}linear_qkv.layer_norm_", COPY, f"{GPT2_LAYER}ln_1"),
    **both(f"{ATTENTION}linear_qkv.", TRANSPOSED_QKV, f"{GPT2_LAYER}attn.c_attn"),
    **both(f"{ATTENTION}linear_proj.", TRANSPOSED, f"{GPT2_LAYER}attn.c_proj"),
    **both(f"{MLP}linear_fc1.layer_norm_", COPY, f"{GPT2_LAYER}ln_2"),
    **both(f"{MLP}linear_fc1.", TRANSPOSED, f"{GPT2_LAYER}mlp.c_fc"),
    **both(f"{MLP}linear_fc2.", TRANSPOSED, f"{GPT2_LAYER}mlp.c_proj"),
    **both("decoder.final_layernorm.", COPY, "transformer.ln_f"),
    **both("output_layer.", COPY, "lm_head"),
}

# Rows, activation and output matrix of families whose layers are Llama's.
LLAMA_LAYERS: dict[str, Any] = {"rows": GATED_ROWS, "activation": SILU, "negated": TIED}
# Fields of those whose config.json may switch biases on.
LLAMA_BIASES: dict[str, Any] = {
    "fixed": {**ROTARY, "normalization": "RMSNorm"},
    "biases": ("attention_bias", "mlp_bias"),
}
BOS_1_EOS_2 = {"bos_token_id": 1, "eos_token_id": 2}
GLM_DECODER = {**GATED_DECODER, "add_qkv_bias": True, "rotary_interleaved": True}
GLM_SETTINGS: dict[str, Any] = {
    "sizes": SIZES,
    "activation": SILU,
    "negated": TIED,
    "only": {"attention_bias": True},
    "defaults": {
        **UNTIED_BY_DEFAULT,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-07,
        "partial_rotary_factor": 0.5,
        "eos_token_id": [151329, 151336, 151338],
        "pad_token_id": 151329,
    },
    "partial_rotary": True,
}
QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            architecture="LlamaForCausalLM",
            sizes=SIZES,
            defaults={**UNTIED_BY_DEFAULT, **BOS_1_EOS_2},
            whole_heads=True,
            **LLAMA_LAYERS,
            **LLAMA_BIASES,
        ),
        Family(
            model_type="mistral",
            architecture="MistralForCausalLM",
            sizes=SIZES,
            fixed=GATED_DECODER,
            defaults={
                **UNTIED_BY_DEFAULT,
                **BOS_1_EOS_2,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
            windows="all",
            **LLAMA_LAYERS,
        ),
        Family(
            model_type="ministral3",
            architecture="Ministral3ForCausalLM",
            sizes=SIZES,
            fixed=GATED_DECODER,
            defaults={
                **UNTIED_BY_DEFAULT,
                **BOS_1_EOS_2,
                "pad_token_id": 11,
                "rms_norm_eps": 1e-5,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "sliding_window": None,
            },
            default_rope=MINISTRAL_3_ROPE,
            windows="all",
            scales_queries=True,
            **LLAMA_LAYERS,
        ),
        Family(
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            sizes=SIZES,
            fixed={**GATED_DECODER, "add_qkv_bias": True},
            served_apart="vLLM",
            defaults={**UNTIED_BY_DEFAULT, **QWEN_WINDOWS},
            windows="layers",
            **LLAMA_LAYERS,
        ),
        Family(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            sizes=SIZES,
            fixed={**GATED_DECODER, "qk_layernorm": True},
            only={"attention_bias": False},
            defaults={**UNTIED_BY_DEFAULT, **QWEN_WINDOWS, "head_dim": 128},
            windows="layers",
            **LLAMA_LAYERS,
        ),
        Family(
            model_type="smollm3",
            architecture="SmolLM3ForCausalLM",
            sizes=SIZES,
            defaults={
                **UNTIED_BY_DEFAULT,
                "tie_word_embeddings": True,
                "num_key_value_heads": 4,
                "rope_theta": 2e6,
                "use_sliding_window": False,
                "sliding_window": None,
                "no_rope_layer_interval": 4,
                "bos_token_id": 128000,
                "eos_token_id": 128001,
                "pad_token_id": 128004,
            },
            windows="layers",
            no_rope_layers=True,
            **LLAMA_LAYERS,
            **LLAMA_BIASES,
        ),
        Family(
            model_type="granite",
            architecture="GraniteForCausalLM",
            sizes={
                **SIZES,
                "softmax_scale": ("attention_multiplier",),
                "embedding_multiplier": ("embedding_multiplier",),
                "residual_multiplier": ("residual_multiplier",),
                "logits_scaling": ("logits_scaling",),
            },
            defaults={**UNTIED_BY_DEFAULT, **BOS_1_EOS_2, "attention_multiplier": 1.0},
            **LLAMA_LAYERS,
            **LLAMA_BIASES,
        ),
        Family(
            model_type="nemotron",
            architecture="NemotronForCausalLM",
            rows=NEMOTRON_ROWS,
            sizes={**SIZES, "norm_epsilon": ("norm_eps",)},
            activation=("hidden_act", {"relu2": {"squared_relu": True}}),
            fixed={**ROTARY, "normalization": "LayerNorm", "apply_layernorm_1p": True},
            biases=("attention_bias", "mlp_bias"),
            negated=TIED,
            defaults={
                **UNTIED_BY_DEFAULT,
                "hidden_act": "relu2",
                "norm_eps": 1e-5,
                "initializer_range": 0.0134,
                "partial_rotary_factor": 0.5,
                "bos_token_id": 2,
                "eos_token_id": 3,
            },
            partial_rotary=True,
        ),
        Family(
            model_type="glm",
            architecture="GlmForCausalLM",
            rows=GLM_ROWS,
            fixed=GLM_DECODER,
            **GLM_SETTINGS,
        ),
        Family(
            model_type="glm4",
            architecture="Glm4ForCausalLM",
            rows=GLM4_ROWS,
            fixed={**GLM_DECODER, "sandwich_norm": True},
            **GLM_SETTINGS,
        ),
        Family(
            model_type="gemma3_text",
            architecture="Gemma3ForCausalLM",
            rows=GEMMA_ROWS,
            gemma=True,
            **gemma.SETTINGS,
        ),
        Family(
            model_type="phi3",
            architecture="Phi3ForCausalLM",
            rows=PHI3_ROWS,
            sizes={**SIZES, "hidden_dropout": ("resid_pdrop", "embd_pdrop")},
            activation=SILU,
            fixed=GATED_DECODER,
            negated=TIED,
            defaults={
                **UNTIED_BY_DEFAULT,
                "rms_norm_eps": 1e-5,
                "sliding_window": None,
                "bos_token_id": 1,
                "eos_token_id": 32000,
                "pad_token_id": 32000,
            },
            rope_types=(),
            partial_rotary=True,
            windows="all",
        ),
        Family(
            model_type="gpt2",
            architecture="GPT2LMHeadModel",
            rows=GPT2_ROWS,
            sizes={
                "num_layers": ("n_layer",),
                "hidden_size": ("n_embd",),
                "ffn_hidden_size": ("n_inner",),
                "num_attention_heads": ("n_head",),
                "max_position_embeddings": ("n_positions",),
                "norm_epsilon": ("layer_norm_epsilon",),
                "init_method_std": ("initializer_range",),
                "attention_dropout": ("attn_pdrop",),
                "hidden_dropout": ("resid_pdrop", "embd_pdrop"),
            },
            activation=(
                "activation_function",
                {
                    "gelu_new": {"bias_gelu_fusion": True},
                    "gelu_pytorch_tanh": {"bias_gelu_fusion": True},
                    "gelu": {},
                },
            ),
            fixed={"position_embedding_type": "learned_absolute", "normalization": "LayerNorm"},
            whole_heads=True,
            negated=TIED,
            only={
                "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False,
                "add_cross_attention": False,
            },
            defaults={
                "tie_word_embeddings": True,
                "activation_function": "gelu_new",
                "layer_norm_epsilon": 1e-5,
                "initializer_range": 0.02,
                "attn_pdrop": 0.1,
                "resid_pdrop": 0.1,
                "scale_attn_weights": True,
                "bos_token_id": 50256,
                "eos_token_id": 50256,
            },
            prefix="transformer.",
            ignored=(r"\.attn\.(masked_)?bias$",),
        ),
        Family(
            model_type="nemotron_h",
            architecture="NemotronHForCausalLM",
            rows=nemotron_h.ROWS,
            **nemotron_h.SETTINGS,
        ),
        Family(
            model_type="bert",
            architecture="BertForMaskedLM",
            rows=bert.ROWS,
            fixed={**bert.FIXED, "apply_residual_connection_post_layernorm": True},
            **bert.SETTINGS,
        ),
        Family(
            model_type="megatron-bert",
            architecture="MegatronBertForMaskedLM",
            rows=bert.PRE_NORM_ROWS,
            fixed=bert.FIXED,
            **bert.SETTINGS,
        ),
        Family(
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            rows=MIXTRAL_ROWS,
            sizes={
                **SIZES,
                "moe_ffn_hidden_size": ("intermediate_size",),
                "num_experts": ("num_local_experts",),
                "moe_router_topk": ("num_experts_per_tok",),
            },
            activation=SILU,
            fixed={**GATED_DECODER, "moe_router_pre_softmax": False},
            negated=TIED,
            defaults={
                **UNTIED_BY_DEFAULT,
                **BOS_1_EOS_2,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
            },
            windows="all",
        ),
        Family(
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            rows=QWEN3_MOE_ROWS,
            sizes={
                **SIZES,
                "moe_ffn_hidden_size": ("moe_intermediate_size",),
                "num_experts": ("num_experts", "num_local_experts"),
                "moe_router_topk": ("num_experts_per_tok",),
            },
            activation=SILU,
            fixed={**GATED_DECODER, "qk_layernorm": True},
            negated={**TIED, "moe_router_pre_softmax": "norm_topk_prob"},
            only={"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
            defaults={
                **UNTIED_BY_DEFAULT,
                "use_sliding_window": False,
                "sliding_window": 4096,
                "norm_topk_prob": False,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            },
            windows="all",
        ),
    )
}
