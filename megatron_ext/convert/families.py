"""Families of Hugging Face models as tables: their weights and their config.json, both ways.

A row says under which names and in which layout a weight of ``arch.weights`` stands in the family's
files. Rows of weights that a model does not have (biases, a head of its own) are not used. A new
family is a new entry of ``FAMILIES``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.convert import bert, nemotron_h
from megatron_ext.convert.layouts import COPY, GATED, QKV, TRANSPOSED, TRANSPOSED_QKV, Layout
from megatron_ext.convert.rows import Row, both


@dataclass(frozen=True, kw_only=True)
class Family:
    """One ``model_type``: all that its models have in common."""

    model_type: str
    architecture: str
    """transformers' class of language models."""
    rows: Mapping[str, Row]
    """By the weight's name in a Megatron checkpoint."""
    sizes: Mapping[str, tuple[str, ...]]
    """Field of ``Arch``: its keys in config.json, the first one present is read, all are written.
    A field may be left out that follows from others."""
    activation: tuple[str, Mapping[str, Mapping[str, bool]]]
    """Key in config.json, and for each value that is computed here the fields of ``Arch``."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``Arch`` that every model of the family has."""
    biases: tuple[str, ...] = ()
    """Switches in config.json, any of which is add_bias_linear; biases that are off are zero."""
    negated: Mapping[str, str] = field(default_factory=dict)
    """Field of ``Arch``: the switch in config.json that says the opposite."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Key in config.json: the one value that is computed here."""
    at_most: Mapping[str, float] = field(default_factory=dict)
    """Key in config.json: the largest value that is computed here."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of the keys that a config.json leaves out."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Keys of every config.json that is written, whatever its origin says."""
    prefix: str = "model."
    """Prefix of the tensors' names; files of the bare model leave it out."""
    ignored: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)
    """Tensors (regular expressions) that files may hold and that are no weights."""
    left_out: tuple[str, ...] = ()
    """Weights (regular expressions) of other heads, which an import leaves out with a warning."""
    old_names: Mapping[str, str] = field(default_factory=dict)
    """End of a tensor's name: what old files have there."""
    partial_rotary: bool = False
    """transformers reads partial_rotary_factor; of other families it computes all channels."""
    served_apart: str = ""
    """An engine that computes head_dim as hidden_size // heads whatever config.json says."""
    has_pattern: bool = False
    """Its layers are sub-layers, which config.json lists: models are HybridModels."""
    whole_heads: bool = False
    """transformers refuses to load a hidden size that is no multiple of the heads; of Llama from
    5.0 on."""


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


HF_LAYER, GPT2_LAYER = "model.layers.{layer}.", "transformer.h.{layer}."
GATED_ROWS = decoder_rows(HF_LAYER, dense_rows(HF_LAYER, GATED, "gate_proj", "up_proj"))
NEMOTRON_ROWS = decoder_rows(HF_LAYER, dense_rows(HF_LAYER, COPY, "up_proj"))
MIXTRAL_ROWS = decoder_rows(HF_LAYER, expert_rows(HF_LAYER, "block_sparse_moe", "w1", "w3", "w2"))
QWEN3_MOE_ROWS = decoder_rows(
    HF_LAYER, expert_rows(HF_LAYER, "mlp", "gate_proj", "up_proj", "down_proj")
)
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
BOS_1_EOS_2 = {"bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            architecture="LlamaForCausalLM",
            rows=GATED_ROWS,
            sizes=SIZES,
            activation=SILU,
            fixed={**ROTARY, "normalization": "RMSNorm"},
            biases=("attention_bias", "mlp_bias"),
            negated=TIED,
            defaults={**UNTIED_BY_DEFAULT, **BOS_1_EOS_2},
            whole_heads=True,
        ),
        Family(
            model_type="mistral",
            architecture="MistralForCausalLM",
            rows=GATED_ROWS,
            sizes=SIZES,
            activation=SILU,
            fixed=GATED_DECODER,
            negated=TIED,
            defaults={
                **UNTIED_BY_DEFAULT,
                **BOS_1_EOS_2,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
        ),
        Family(
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            rows=GATED_ROWS,
            sizes=SIZES,
            activation=SILU,
            fixed={**GATED_DECODER, "add_qkv_bias": True},
            served_apart="vLLM",
            negated=TIED,
            defaults={**UNTIED_BY_DEFAULT, "use_sliding_window": False},
        ),
        Family(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            rows=GATED_ROWS,
            sizes=SIZES,
            activation=SILU,
            fixed={**GATED_DECODER, "qk_layernorm": True},
            negated=TIED,
            only={"attention_bias": False},
            defaults={**UNTIED_BY_DEFAULT, "use_sliding_window": False, "head_dim": 128},
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
                "norm_topk_prob": False,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            },
        ),
    )
}
