"""Type of each key of a config.json. Pure; raises ``ValueError`` with one line."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from megatron_ext.arch import Arch
from megatron_ext.convert.family import Family

Config = Mapping[str, Any]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_ids(value: Any) -> bool:
    return all(map(_is_whole, value if isinstance(value, list) else [value]))


KINDS: dict[str, Callable[[Any], bool]] = {
    "number": _is_number,
    "whole number": _is_whole,
    "switch (true or false)": lambda value: isinstance(value, bool),
    "text": lambda value: isinstance(value, str),
    "object": lambda value: isinstance(value, dict),
    "list of texts": _is_names,
    "list of whole numbers": lambda value: isinstance(value, list) and all(map(_is_whole, value)),
    "token id": _is_ids,
}
# Keys that are read of every family.
TYPES = {
    "vocab_size": "whole number",
    "rope_theta": "number",
    "partial_rotary_factor": "number",
    "rope_scaling": "object",
    "rope_parameters": "object",
    "sliding_window": "whole number",
    "use_sliding_window": "switch (true or false)",
    "max_window_layers": "whole number",
    "layer_types": "list of texts",
    "no_rope_layers": "list of whole numbers",
    "no_rope_layer_interval": "whole number",
    "sliding_window_pattern": "whole number",
    "query_pre_attn_scalar": "number",
    "rope_local_base_freq": "number",
    "layers_block_type": "list of texts",
    "transformers_version": "text",
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "token id"),
}
ROPE_TYPES = {
    "rope_type": "text",
    "type": "text",
    **dict.fromkeys(
        (
            "rope_theta",
            "partial_rotary_factor",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "llama_4_scaling_beta",
            "mscale",
            "mscale_all_dim",
        ),
        "number",
    ),
    "truncate": "switch (true or false)",
    "original_max_position_embeddings": "whole number",
}
# null is a value of its own here; elsewhere it leaves a key out.
NULL = ("sliding_window", "num_key_value_heads", "head_dim", "rope_theta")


def typed(family: Family, config: Config) -> dict[str, Any]:
    """Return ``config`` with the family's values of the keys that it leaves out.

    Raises:
        ValueError: naming a key that is read and holds a value of another kind.
    """
    said = {key: value for key, value in config.items() if value is not None or key in NULL}
    others: dict[Any, str] = {float: "number", float | None: "number", str | None: "text"}
    types = {f.name: others.get(f.type, "whole number") for f in fields(Arch)}
    of_sizes = {key: types[name] for name, keys in family.sizes.items() for key in keys}
    switches = dict.fromkeys((*family.negated.values(), *family.biases), "switch (true or false)")
    check_types(
        said,
        {
            **TYPES,
            **dict.fromkeys(family.at_most, "number"),
            **of_sizes,
            **switches,
            family.activation[0]: "text",
        },
    )
    return {**family.defaults, **said}


def check_types(config: Config, types: Mapping[str, str]) -> None:
    """Raise ``ValueError`` for the first key that holds what its type does not allow."""
    for key, kind in types.items():
        value = config.get(key)
        if value is None or KINDS[kind](value):
            continue
        if kind == "whole number" and not _is_number(value):
            kind = "number"
        raise ValueError(f"{key} {json.dumps(value)} is no {kind}")
