"""The table of weights: parameter counts of the paper, round trip through saved args."""

from dataclasses import replace

import pytest

from megatron_ext.arch import Arch, forward_flops, num_parameters, shape, weights

NEMOTRON_15B = Arch(
    num_layers=32,
    hidden_size=6144,
    ffn_hidden_size=24576,
    num_attention_heads=48,
    num_query_groups=8,
    kv_channels=128,
    max_position_embeddings=4096,
    vocab_size=256000,
    padded_vocab_size=256000,
    position_embedding_type="rope",
    squared_relu=True,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
    apply_layernorm_1p=True,
)

# Paper, Table 10; exact counts from the shapes (norms with weight and bias, no linear biases).
COUNTS = {
    "Nemotron-4 15B": ({}, 15_628_775_424),
    "Minitron 8B": ({"hidden_size": 4096, "ffn_hidden_size": 16384}, 8_271_699_968),
    "Minitron 4B": (
        {"hidden_size": 3072, "num_attention_heads": 24, "ffn_hidden_size": 9216},
        4_190_509_056,
    ),
    "16 layers": ({"num_layers": 16}, 9_387_257_856),
    "Nemotron-3 8B": (
        {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_query_groups": 32,
            "ffn_hidden_size": 16384,
        },
        8_540_135_424,
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_the_paper(name):
    sizes, expected = COUNTS[name]
    assert num_parameters(replace(NEMOTRON_15B, **sizes)) == expected


def test_non_embedding_parameters():
    without = num_parameters(NEMOTRON_15B, embeddings=False)
    assert without == 15_628_775_424 - 2 * 256000 * 6144


@pytest.mark.parametrize(
    "change", [{}, {"num_query_groups": 48}, {"position_embedding_type": "learned_absolute"}]
)
def test_round_trip_through_saved_args(change):
    arch = replace(NEMOTRON_15B, **change)
    assert Arch.from_args(arch.to_args()) == arch


def test_a_missing_size_is_named():
    args = NEMOTRON_15B.to_args()
    del args["ffn_hidden_size"]
    with pytest.raises(KeyError, match="ffn_hidden_size"):
        Arch.from_args(args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_query_groups": 7}, "--num-query-groups 7"),
        ({"hidden_size": 0}, "--hidden-size must be >= 1: 0"),
        ({"padded_vocab_size": 128}, "vocabulary 256000"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(NEMOTRON_15B, **change)


def test_gated_mlp_biases_and_qk_norms_have_rows():
    arch = replace(NEMOTRON_15B, swiglu=True, add_qkv_bias=True, qk_layernorm=True)
    rows = {w.key: shape(w, arch) for w in weights(arch)}
    assert rows["decoder.layers.mlp.linear_fc1.weight"] == (2 * 24576, 6144)
    assert rows["decoder.layers.self_attention.linear_qkv.bias"] == ((48 + 16) * 128,)
    assert rows["decoder.layers.self_attention.q_layernorm.weight"] == (128,)
    assert "decoder.layers.self_attention.linear_proj.bias" not in rows


def test_flops_are_two_per_weight_and_token_plus_attention():
    arch = replace(NEMOTRON_15B, normalization="RMSNorm")
    norms = (2 * arch.num_layers + 1) * arch.hidden_size
    matrices = num_parameters(arch) - norms - arch.padded_vocab_size * arch.hidden_size
    attention = arch.num_layers * 48 * 128 * 4096
    assert forward_flops(arch, 4096) == 2 * (matrices + attention)
