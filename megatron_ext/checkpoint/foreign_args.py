"""Sizes of a checkpoint that NeMo or Megatron Bridge wrote: YAML beside it instead of saved args.

    iter_*/run_config.yaml        Megatron Bridge, under ``model``
    context/model.yaml            NeMo 2, beside the folder weights/, under ``config``

The files name classes and functions to call (``_target_``). None is called here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.arch import check_supported
from megatron_ext.runtime.texts import parse_yaml

# File, seen from the checkpoint's folder, and the key of the model in it.
FILES = {"run_config.yaml": "model", "../context/model.yaml": "config"}
# Names of Megatron-LM's args, and what the files call them.
NAMES = {
    "num_layers": "num_layers",
    "hybrid_layer_pattern": "hybrid_layer_pattern",
    "hybrid_override_pattern": "hybrid_override_pattern",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_groups": "mamba_num_groups",
    "mamba_state_dim": "mamba_state_dim",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups",
    "kv_channels": "kv_channels",
    "max_position_embeddings": "seq_length",
    "vocab_size": "vocab_size",
    "normalization": "normalization",
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "swiglu": "gated_linear_unit",
    "add_bias_linear": "add_bias_linear",
    "add_qkv_bias": "add_qkv_bias",
    "qk_layernorm": "qk_layernorm",
    "position_embedding_type": "position_embedding_type",
    "rotary_percent": "rotary_percent",
    "rotary_interleaved": "rotary_interleaved",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "softmax_scale": "softmax_scale",
    "no_rope_freq": "no_rope_freq",
    "window_size": "window_size",
    "window_attn_skip_freq": "window_attn_skip_freq",
    "rotary_scaling_factor": "yarn_rotary_scaling_factor",
    "yarn_original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "yarn_beta_fast": "yarn_beta_fast",
    "yarn_beta_slow": "yarn_beta_slow",
    "yarn_correction_range_round_to_int": "yarn_correction_range_round_to_int",
    "mscale": "yarn_mscale",
    "mscale_all_dim": "yarn_mscale_all_dim",
    "num_experts": "num_moe_experts",
    "init_method_std": "init_method_std",
    "attention_dropout": "attention_dropout",
    "hidden_dropout": "hidden_dropout",
}
# Activation, by the last word of the function's name, gated or not: fields of ``Arch``.
ACTIVATIONS = {
    ("silu", True): {"swiglu": True},
    ("fast_gelu", True): {"geglu": True},
    ("squared_relu", False): {"squared_relu": True},
    ("gelu", False): {},
    ("fast_gelu", False): {"bias_gelu_fusion": True},
}


def read_args(folder: Path, embedding_rows: int) -> dict[str, Any] | None:
    """Return the model of a checkpoint's folder under the names of Megatron-LM's saved args.

    Args:
        folder: with the tensors.
        embedding_rows: of its word embeddings: the padded vocabulary, which the files leave open.

    Returns:
        None if there is no such file.

    Raises:
        ValueError: the file is damaged, or describes what is not built here.
    """
    for name, key in FILES.items():
        if (folder / name).exists():
            try:
                model = parse_yaml((folder / name).read_text())[key]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{name} cannot be read: {str(error).splitlines()[0]}") from error
            if not isinstance(model, Mapping):
                raise ValueError(f"{name} cannot be read: {key} is no table")
            return args_of(model, embedding_rows)
    return None


def args_of(model: Mapping[str, Any], embedding_rows: int) -> dict[str, Any]:
    """Return Megatron-LM's args of what a file says of its model."""
    check_supported(model)
    args = {new: model[old] for new, old in NAMES.items() if model.get(old) is not None}
    args |= {name: value for name, value in model.items() if name.startswith("moe_")}
    hidden, heads = args["hidden_size"], args["num_attention_heads"]
    args.setdefault("kv_channels", hidden // heads)
    args.setdefault("ffn_hidden_size", 4 * hidden)
    args.setdefault("num_query_groups", heads)
    interpolation = args.get("rotary_seq_len_interpolation_factor", 1)
    if interpolation != int(interpolation):
        raise ValueError(f"seq_len_interpolation_factor {interpolation} is not computed here")
    factor = model.get("rope_scaling_factor") or model.get("scale_factor")
    tied = model.get("share_embeddings_and_output_weights", True)
    return {
        **args,
        **_activation(model),
        "group_query_attention": args["num_query_groups"] != heads,
        "rotary_base": int(model.get("rotary_base") or 10000),
        "use_rope_scaling": bool(model.get("rope_scaling", "scale_factor" in model)),
        **({"rope_scaling_factor": factor} if factor else {}),
        "untie_embeddings_and_output_weights": not tied,
        "vocab_size": min(args.get("vocab_size", embedding_rows), embedding_rows),
        "padded_vocab_size": embedding_rows,
        "tokenizer_type": None,
    }


def _activation(model: Mapping[str, Any]) -> dict[str, bool]:
    function = model.get("activation_func") or {"_target_": "gelu"}
    name = str(function.get("_target_") if isinstance(function, Mapping) else function)
    gated = bool(model.get("gated_linear_unit", False))
    found = ACTIVATIONS.get((name.rpartition(".")[2], gated))
    if found is None:
        raise ValueError(f"activation_func {name}{' gated' * gated} is not computed here")
    # megatron-core's fused kernel of gelu is its tanh approximation.
    is_fused = model.get("bias_activation_fusion") and model.get("add_bias_linear", True)
    plain = {"swiglu": False, "geglu": False, "squared_relu": False, "bias_gelu_fusion": False}
    return plain | found | ({"bias_gelu_fusion": True} if not found and is_fused else {})
