"""Hugging Face's BERTs as tables: ``bert``, post-norm, and ``megatron-bert``, pre-norm.

The norm behind a post-norm layer is Megatron's norm before the next one, and the norm of the
embedding that before the first.
"""

from megatron_ext.convert.layouts import COPY, QKV
from megatron_ext.convert.rows import Row, both

ENCODER = "encoder.layers."
BODY, HEAD = "bert.encoder.layer.{layer}.", "cls.predictions."
COMMON_ROWS = {
    **both("embedding.word_embeddings.", COPY, "bert.embeddings.word_embeddings"),
    **both("embedding.position_embeddings.", COPY, "bert.embeddings.position_embeddings"),
    **both("embedding.tokentype_embeddings.", COPY, "bert.embeddings.token_type_embeddings"),
    **both(
        f"{ENCODER}self_attention.linear_qkv.",
        QKV,
        *(f"{BODY}attention.self.{name}" for name in ("query", "key", "value")),
    ),
    **both(f"{ENCODER}self_attention.linear_proj.", COPY, f"{BODY}attention.output.dense"),
    **both(f"{ENCODER}mlp.linear_fc1.", COPY, f"{BODY}intermediate.dense"),
    **both(f"{ENCODER}mlp.linear_fc2.", COPY, f"{BODY}output.dense"),
    **both("lm_head.dense.", COPY, f"{HEAD}transform.dense"),
    **both("lm_head.layer_norm.", COPY, f"{HEAD}transform.LayerNorm"),
    "output_layer.weight": Row(COPY, (f"{HEAD}decoder.weight",)),
    "output_layer.bias": Row(COPY, (f"{HEAD}bias",)),
}


def norms(first: str, inside: str, behind: str, last: str) -> dict[str, Row]:
    """Return the rows of a BERT's norms.

    Args:
        first: before the first layer.
        inside: between attention and MLP.
        behind: before a layer that is not the first.
        last: behind the last layer.
    """
    return {
        f"{key}{kind}": Row(COPY, (f"{name}.{kind}",), (f"{other}.{kind}",) * bool(other))
        for kind in ("weight", "bias")
        for key, name, other in (
            (f"{ENCODER}self_attention.linear_qkv.layer_norm_", behind, first),
            (f"{ENCODER}mlp.linear_fc1.layer_norm_", inside, ""),
            ("encoder.final_layernorm.", last, ""),
        )
    }


ROWS = COMMON_ROWS | norms(
    "bert.embeddings.LayerNorm",
    f"{BODY}attention.output.LayerNorm",
    "bert.encoder.layer.{before}.output.LayerNorm",
    "bert.encoder.layer.{last}.output.LayerNorm",
)
PRE_NORM_ROWS = COMMON_ROWS | norms(
    f"{BODY}attention.ln", f"{BODY}ln", f"{BODY}attention.ln", "bert.encoder.ln"
)

SETTINGS = {
    "sizes": {
        "num_layers": ("num_hidden_layers",),
        "hidden_size": ("hidden_size",),
        "ffn_hidden_size": ("intermediate_size",),
        "num_attention_heads": ("num_attention_heads",),
        "max_position_embeddings": ("max_position_embeddings",),
        "num_tokentypes": ("type_vocab_size",),
        "norm_epsilon": ("layer_norm_eps",),
        "init_method_std": ("initializer_range",),
        "attention_dropout": ("attention_probs_dropout_prob",),
        "hidden_dropout": ("hidden_dropout_prob",),
    },
    "activation": ("hidden_act", {"gelu": {}}),
    "only": {
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    },
    "defaults": {
        "hidden_act": "gelu",
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1,
    },
    "prefix": "bert.",
    # Weights tied to others, and a buffer.
    "ignored": (r"^cls\.predictions\.decoder\.bias$", r"embeddings\.position_ids$"),
    "left_out": (r"pooler\.", r"^cls\.seq_relationship\."),
    "old_names": {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"},
    "whole_heads": True,
}
FIXED = {
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "bert_binary_head": False,
}
