"""config.json with values of other kinds: one line that names the key, for every key and family."""

import pytest

from megatron_ext.convert.config import arch_of
from megatron_ext.convert.families import FAMILIES
from megatron_ext.convert.types import ROPE_TYPES, TYPES

COMMON = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "rope_theta": 10000.0,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "sliding_window": None,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
GPT2 = {"vocab_size": 61, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 24}
VALUES = ["12", "", 1.5, True, None, [], [1], {}, {"a": 1}, float("nan"), -3, 0, 10**30]


def config_of(name):
    return {"model_type": name, **(GPT2 if name == "gpt2" else COMMON)}


@pytest.mark.parametrize("name", FAMILIES)
def test_any_value_is_read_or_refused_in_a_line(name):
    family, config = FAMILIES[name], config_of(name)
    keys = {*TYPES, *family.defaults, *family.only, *family.biases, "model_type"}
    keys |= {key for keys in family.sizes.values() for key in keys}
    refused = 0
    for key in keys:
        for value in VALUES:
            refused += is_refused({**config, key: value})
    for key in ROPE_TYPES:
        for value in VALUES:
            rope = {"rope_type": "llama3", "rope_theta": 1e4, key: value}
            is_refused({**config, "rope_scaling": rope})
    assert refused > 100


def is_refused(config):
    """Whether it is, with one line; any other exception is let through."""
    try:
        arch_of(config)
    except ValueError as error:
        message = str(error)
    else:
        return False
    assert "\n" not in message
    return True


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": "linear"}, 'rope_scaling "linear" is no object'),
        ({"vocab_size": "103"}, 'vocab_size "103" is no number'),
        ({"hidden_size": 48.5}, "hidden_size 48.5 is no whole number"),
        ({"partial_rotary_factor": "0.5"}, 'partial_rotary_factor "0.5" is no number'),
        ({"attention_bias": "yes"}, 'attention_bias "yes" is no switch'),
        ({"rms_norm_eps": True}, "rms_norm_eps true is no number"),
        ({"layer_types": "full_attention"}, "layer_types .* is no list"),
        ({"model_type": ["llama"]}, "model_type .* is not known"),
        ({"rope_parameters": {"rope_theta": "1"}}, 'rope_theta "1" is no number'),
    ],
)
def test_messages(values, message):
    with pytest.raises(ValueError, match=message):
        arch_of({**config_of("llama"), **values})


def test_what_means_the_default_is_read():
    """Null, and a linear scaling by 1."""
    for name, values in (
        ("qwen3_moe", {"mlp_only_layers": None, "norm_topk_prob": None}),
        ("llama", {"tie_word_embeddings": None, "rms_norm_eps": None}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 1.0}, "attention_bias": None}),
        ("gpt2", {"n_inner": None, "scale_attn_weights": None}),
    ):
        config = config_of(name)
        assert arch_of({**config, **values}) == arch_of(config)
    assert arch_of({**config_of("mistral"), "num_key_value_heads": None}).num_query_groups == 4
