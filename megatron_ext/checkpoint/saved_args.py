"""The args that a checkpoint is saved with: what Megatron-LM and Megatron Bridge read of them.

Both take a model's sizes from here (Megatron-LM with --use-checkpoint-args) and fail on a name that
is missing. The values are plain, so that every reader may refuse to unpickle anything else.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch

from megatron_ext.arch import Arch
from megatron_ext.cli.size_flags import vocab_multiple

# Names that they read and that no flag here has, with Megatron-LM's defaults (core_v0.19.2;
# moe_use_legacy_grouped_gemm is older).
DEFAULTS: dict[str, Any] = {
    "bf16": False,
    "bias_swiglu_fusion": True,
    "ckpt_format": "torch_dist",
    "ckpt_fully_parallel_save": True,
    "config_logger_dir": "",
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
    "context_parallel_size": 1,
    "cp_comm_type": ["p2p"],
    "data_parallel_size": 1,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "expert_model_parallel_size": 1,
    "fp16": False,
    "fp16_lm_cross_entropy": False,
    "fp8_param_gather": False,
    "heterogeneous_layers_config_encoded_json": None,
    "heterogeneous_layers_config_path": None,
    "init_method_xavier_uniform": False,
    "init_model_with_meta_device": False,
    "merge_file": None,
    "moe_grouped_gemm": False,
    "moe_use_legacy_grouped_gemm": False,
    "moe_layer_freq": 1,
    "moe_token_dispatcher_type": "allgather",
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "no_persist_layer_norm": False,
    "no_save_optim": True,
    "no_save_rng": True,
    "overlap_p2p_comm": True,
    "params_dtype": torch.float32,
    "pipeline_model_parallel_size": 1,
    "qk_l2_norm": False,
    "sequence_parallel": False,
    "skipped_train_samples": 0,
    "tensor_model_parallel_size": 1,
    "tokenizer_model": None,
    "tokenizer_type": None,
    "transformer_impl": "transformer_engine",
    "trust_remote_code": False,
    "virtual_pipeline_model_parallel_size": None,
    "vocab_file": None,
    "world_size": 1,
}
PLAIN = (bool, int, float, str, torch.dtype, type(None))


def complete(arch: Arch, args: Mapping[str, Any]) -> Namespace:
    """Return the args of a checkpoint of ``arch``.

    ``args`` are what else is known; what is not plain among them (enums, paths, signals) is left
    out. ``seq_length``, where nothing was trained yet, is the longest that the model takes.
    Precision follows from ``params_dtype``.
    """
    plain = {name: value for name, value in args.items() if _is_plain(value)}
    dtype = plain.get("params_dtype", DEFAULTS["params_dtype"])
    derived = {
        **arch.to_args(),
        "make_vocab_size_divisible_by": vocab_multiple(arch),
        "seq_length": plain.get("seq_length") or arch.max_position_embeddings,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
    }
    if plain.get("transformer_impl") is None:  # here: what the machine has
        derived["transformer_impl"] = DEFAULTS["transformer_impl"]
    return Namespace(**{**DEFAULTS, **plain, **derived})


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return type(value) in PLAIN
