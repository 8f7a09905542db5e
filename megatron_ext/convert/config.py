"""config.json of a Hugging Face model as an ``Arch``, and back; pure functions.

What a config asks for and the model here does not compute is refused by name. All functions raise
``ValueError`` for that, with one line.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from megatron_ext.arch import Arch, rotary, weights
from megatron_ext.arch.attention import score_scale
from megatron_ext.convert import gemma, layers
from megatron_ext.convert import rotary as rotary_keys
from megatron_ext.convert.families import FAMILIES
from megatron_ext.convert.family import Family
from megatron_ext.convert.rows import row_name
from megatron_ext.convert.types import Config, typed

# The version of transformers whose keys are written, beside those of older ones.
WRITTEN_FOR = "5.0.0"
# Switches of biases: what the names of their weights hold.
BIASED = {"attention_bias": ".self_attention.linear_", "mlp_bias": ".mlp.linear_"}
# Sub-layers by name, of transformers from 5.0 on, and their symbols.
LISTS = ("layers_block_type", "layer_types")
SYMBOLS_OF = {
    **dict.fromkeys(("mamba", "linear_attention"), "M"),
    **dict.fromkeys(("attention", "full_attention"), "*"),
    "mlp": "-",
}
# Fields of ``Arch`` that matter in training only, or not in the names and shapes of a model.
NOT_COMPARED = {
    "vocab_size",
    "padded_vocab_size",
    "init_method_std",
    "attention_dropout",
    "hidden_dropout",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
}


def family_of(config: Config) -> Family:
    """Return the family that ``model_type`` names."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not known; known are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def arch_of(
    config: Config,
    *,
    vocab_size: int | None = None,
    make_vocab_size_divisible_by: int = 1,
) -> Arch:
    """Return the architecture that a config.json describes.

    Args:
        config: what the file holds.
        vocab_size: tokens of the tokenizer; None for all rows of the embedding.
        make_vocab_size_divisible_by: rows are added up to a multiple of this.
    """
    family = family_of(config)
    config = typed(family, config)
    if family.gemma:
        config = gemma.with_one_rope(config)
    if family.has_pattern:
        config = with_pattern(config)
    rows, multiple = _needed(config, "vocab_size"), make_vocab_size_divisible_by
    sizes = _sizes(family, config)
    _check_computed(family, config)
    sizes |= layers.layer_sizes(
        family, config, sizes["num_layers"], sizes["max_position_embeddings"]
    )
    if family.gemma:
        sizes |= gemma.gemma_sizes(config, sizes["hidden_size"])
    if family.fixed["position_embedding_type"] == "rope":
        sizes |= rotary_keys.rotary_sizes(family, config)
        if sizes["rotary_percent"] == 1 and sizes["kv_channels"] % 2:
            raise ValueError(f"head_dim {sizes['kv_channels']} is odd: channels rotate in pairs")
    return Arch(
        **{**family.fixed, **sizes},
        **_activation(family, config),
        **_switches(family, config),
        vocab_size=rows if vocab_size is None else min(vocab_size, rows),
        padded_vocab_size=-(-rows // multiple) * multiple,
    )


def with_positions(config: Config, number: int | None) -> dict[str, Any]:
    """Return ``config`` for sequences of at most ``number`` tokens; None keeps its own length."""
    key = "n_positions" if "n_positions" in config else "max_position_embeddings"
    return dict(config) if number is None else {**config, key: number}


def config_of(arch: Arch, family: Family, origin: Config, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model of ``arch``.

    Args:
        arch: its sizes; what they say replaces what ``origin`` says.
        family: the model type to write.
        origin: the config of the model that it comes from, or an empty one.
        dtype: of the weights, "bfloat16" and the like.

    Raises:
        ValueError: the family has no such models.
    """
    if problem := broken_heads(arch, family):
        raise ValueError(problem)
    if missing := [w.key for w in weights(arch) if row_name(w.key, family.rows) not in family.rows]:
        raise ValueError(f"{family.model_type} has no tensor for {missing[0]}")
    is_own = origin.get("model_type") == family.model_type
    config = {"transformers_version": WRITTEN_FOR, **(origin if is_own else {})}
    config |= {"model_type": family.model_type, "architectures": [family.architecture]}
    config |= {"vocab_size": num_rows(arch, origin), "torch_dtype": dtype, "dtype": dtype}
    for name, keys in family.sizes.items():
        config |= dict.fromkeys(keys, getattr(arch, name))
    if "softmax_scale" in family.sizes:
        config |= dict.fromkeys(family.sizes["softmax_scale"], score_scale(arch))
    config |= dict.fromkeys(family.biases, arch.add_bias_linear)
    config |= {key: not getattr(arch, name) for name, key in family.negated.items()}
    config |= family.only | family.written
    config |= _activation_config(arch, family, config)
    if arch.position_embedding_type in rotary.KINDS:
        config |= rotary_keys.rotary_config(arch, family, origin)
    if family.gemma:
        config |= gemma.gemma_config(arch, config)
    if family.has_pattern:
        config |= {key: _names(arch.pattern, config[key]) for key in LISTS if key in config}
    else:
        config |= layers.layer_config(arch, family, config, origin)
    _check_reads_back(arch, family, config)
    return config


def broken_heads(arch: Arch, family: Family) -> str | None:
    """Return why transformers would not load a model of these heads, or None."""
    hidden, heads = arch.hidden_size, arch.num_attention_heads
    if not family.whole_heads or hidden % heads == 0:
        return None
    return (
        f"hidden_size {hidden} is no multiple of {heads} heads, which transformers asks of "
        f"{family.model_type}"
    )


def num_rows(arch: Arch, origin: Config) -> int:
    """Return how many rows a Hugging Face embedding has: those of the origin, or the tokens'.

    Many models have more rows than their tokenizer has tokens; those have been kept as padding.
    """
    rows = origin.get("vocab_size", arch.vocab_size)
    return rows if arch.vocab_size <= rows <= arch.padded_vocab_size else arch.vocab_size


def _names(pattern: str, origin: list[str]) -> list[str]:
    """Return the name of each sub-layer, as the origin has it where it has such."""
    names = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    names |= {SYMBOLS_OF[name]: name for name in origin}
    return [names[symbol] for symbol in pattern]


def with_pattern(config: Config) -> dict[str, Any]:
    """Return ``config`` with hybrid_override_pattern alone to say what the sub-layers are.

    Raises:
        ValueError: it does not say, or names sub-layers that are not computed here.
    """
    listed = next((config[key] for key in LISTS if config.get(key)), None)
    if listed is None:
        pattern = _needed(config, "hybrid_override_pattern")
    elif unknown := [name for name in listed if name not in SYMBOLS_OF]:
        raise ValueError(f"sub-layers {unknown[0]!r} are not computed here")
    else:
        pattern = "".join(SYMBOLS_OF[name] for name in listed)
    others = [symbol for symbol in pattern if symbol not in SYMBOLS_OF.values()]
    if others:
        raise ValueError(f"hybrid_override_pattern {pattern}: {others[0]} is not computed here")
    rest = {key: value for key, value in config.items() if key not in LISTS}
    return {**rest, "hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}


def _needed(config: Config, key: str) -> Any:
    if config.get(key) is None:
        raise ValueError(f"there is no {key}")
    return config[key]


def _sizes(family: Family, config: Config) -> dict[str, Any]:
    """Return the fields of ``family.sizes``; those that may be left out follow from the others."""
    sizes = {}
    for name, keys in family.sizes.items():
        values = [config[key] for key in keys if config.get(key) is not None]
        sizes |= {name: values[0]} if values else {}
    for name in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
        if name not in sizes:
            _needed(config, family.sizes[name][0])
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    sizes.setdefault("ffn_hidden_size", 4 * hidden)
    sizes.setdefault("num_query_groups", heads)
    sizes.setdefault("kv_channels", hidden // max(heads, 1))  # Arch refuses no heads
    return sizes


def _check_computed(family: Family, config: Config) -> None:
    """Refuse what the model here would silently leave out."""
    for key, only in {**family.only, "quantization_config": None}.items():
        if config.get(key, only) != only:
            raise ValueError(f"{key} {json.dumps(config[key])} is not computed here")
    for key, most in family.at_most.items():
        if config.get(key, most) > most:
            raise ValueError(f"{key} {config[key]} is not computed here: at most {most}")


def _activation(family: Family, config: Config) -> Mapping[str, bool]:
    key, known = family.activation
    value = _needed(config, key)
    if value not in known:
        raise ValueError(f"{key} {value!r} is not computed here, only {', '.join(known)}")
    return known[value]


def _activation_config(arch: Arch, family: Family, config: Config) -> dict[str, str]:
    """Return the name of the activation, the origin's if it is another name of the same."""
    key, known = family.activation
    names = ("swiglu", "geglu", "squared_relu", "bias_gelu_fusion")
    ours = {name: True for name in names if getattr(arch, name)}
    fitting = [value for value, meaning in known.items() if meaning == ours]
    if not fitting:
        raise ValueError(f"{family.model_type} has no activation {' '.join(ours) or 'gelu'}")
    return {key: config[key] if config.get(key) in fitting else fitting[0]}


def _switches(family: Family, config: Config) -> dict[str, bool]:
    switches = {name: not _needed(config, key) for name, key in family.negated.items()}
    on = [bool(config.get(key)) for key in family.biases]
    return switches | ({"add_bias_linear": any(on)} if on else {})


def without_biases(config: Config, family: Family) -> tuple[str, ...]:
    """Return parts of the names of weights that have no biases where others of the model have.

    Megatron's models have all or none: such a bias is zero, and computes the same.
    """
    off = [key for key in family.biases if not config.get(key)]
    return tuple(BIASED[key] for key in off) if len(off) < len(family.biases) else ()


def _check_reads_back(arch: Arch, family: Family, config: Config) -> None:
    """Raise unless ``config`` says all of ``arch``: the family may have no word for a part."""
    again = _comparable(arch_of(config))
    for name, value in _comparable(arch).items():
        if again[name] != value:
            raise ValueError(
                f"{family.model_type} has no models with {name} {value}: its files would be read "
                f"as {again[name]}"
            )


def _comparable(arch: Arch) -> dict[str, Any]:
    """Return the fields that decide what a model computes."""
    arch = layers.comparable(rotary_keys.comparable(arch))
    arch = replace(arch, softmax_scale=score_scale(arch))
    if arch.num_experts is not None:
        arch = replace(arch, ffn_hidden_size=arch.moe_ffn_hidden_size)
    if arch.add_bias_linear:
        arch = replace(arch, add_qkv_bias=True)
    return {f.name: getattr(arch, f.name) for f in fields(Arch) if f.name not in NOT_COMPARED}
