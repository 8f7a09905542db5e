"""Keys of config.json that Gemma alone has, as fields of ``Arch``, and back. Pure.

The embedding is multiplied by sqrt(hidden_size), scores by 1 / sqrt(query_pre_attn_scalar), and
layers with a window have a rotary base of their own.
"""

from typing import Any

from megatron_ext.arch import Arch
from megatron_ext.arch.attention import score_scale
from megatron_ext.convert.decoder import GATED_DECODER, SIZES, TIED
from megatron_ext.convert.types import Config, check_types

SETTINGS: dict[str, Any] = {
    "sizes": SIZES,
    "activation": ("hidden_activation", {"gelu_pytorch_tanh": {"geglu": True}}),
    "fixed": {
        **GATED_DECODER,
        "qk_layernorm": True,
        "apply_layernorm_1p": True,
        "sandwich_norm": True,
    },
    "negated": TIED,
    "only": {
        "attention_bias": False,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    "defaults": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    },
    "windows": "layers",
    "whole_heads": True,
}
LOCAL, WHOLE = "sliding_attention", "full_attention"


def with_one_rope(config: Config) -> dict[str, Any]:
    """Return ``config`` with the rotary keys of layers without a window alone, as others have them.

    ``rope_local_base_freq`` is the base of the others, in the keys of any version of transformers.
    """
    both = config.get("rope_parameters")
    if both is None:
        return dict(config)
    if not both.keys() & {LOCAL, WHOLE}:
        raise ValueError(f"rope_parameters has neither {WHOLE} nor {LOCAL}")
    check_types(both, dict.fromkeys((LOCAL, WHOLE), "object"))
    local = both.get(LOCAL) or {}
    if local.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {local['rope_type']!r} of {LOCAL} is not computed here")
    check_types(local, {"rope_theta": "number"})
    base = local.get("rope_theta", config["rope_local_base_freq"])
    whole = both.get(WHOLE) or {}
    return {**config, "rope_parameters": whole, "rope_local_base_freq": base}


def gemma_sizes(config: Config, hidden_size: int) -> dict[str, Any]:
    """Return the fields; ``config`` is that of ``with_one_rope``."""
    base, scalar = config["rope_local_base_freq"], config["query_pre_attn_scalar"]
    if base is None or base != int(base) or base < 1:
        raise ValueError(f"rope_local_base_freq {base} is no whole number from 1 on")
    if scalar <= 0:
        raise ValueError(f"query_pre_attn_scalar {scalar} is not above 0")
    return {
        "embedding_multiplier": max(hidden_size, 0) ** 0.5,
        "softmax_scale": scalar**-0.5,
        "rotary_base_local": int(base),
    }


def gemma_config(arch: Arch, config: Config) -> dict[str, Any]:
    """Return the keys; ``config`` has the rotary ones of layers without a window."""
    base = float(arch.rotary_base_local or arch.rotary_base)
    local = {"rope_type": "default", "rope_theta": base}
    return {
        "query_pre_attn_scalar": round(score_scale(arch) ** -2),
        "rope_local_base_freq": base,
        "rope_parameters": {WHOLE: config["rope_parameters"], LOCAL: local},
    }
