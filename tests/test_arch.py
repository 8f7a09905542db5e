"""The table of weights: parameter counts of the paper, round trip through saved args."""

import re
from dataclasses import fields, replace

import pytest

from megatron_ext.arch import Arch, forward_flops, num_parameters, shape, weights
from megatron_ext.checkpoint import foreign_args

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
    "width": (
        {"hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 16384},
        7_734_829_056,
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_the_paper(name):
    sizes, expected = COUNTS[name]
    assert num_parameters(replace(NEMOTRON_15B, **sizes)) == expected


# arXiv:2408.11796, Table 3; exact counts from the shapes, without norms.
LLAMA_8B = replace(
    NEMOTRON_15B,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    vocab_size=128256,
    padded_vocab_size=128256,
    normalization="RMSNorm",
    squared_relu=False,
    swiglu=True,
    apply_layernorm_1p=False,
)
NEMO_12B = replace(
    LLAMA_8B, num_layers=40, hidden_size=5120, vocab_size=131072, padded_vocab_size=131072
)


@pytest.mark.parametrize(
    ("arch", "sizes", "expected"),
    [
        (LLAMA_8B, {"hidden_size": 3072, "ffn_hidden_size": 9216}, 4_512_546_816),
        (LLAMA_8B, {"num_layers": 16}, 4_540_334_080),
        (NEMO_12B, {"hidden_size": 4096, "ffn_hidden_size": 11520}, 8_413_773_824),
    ],
)
def test_parameter_counts_of_the_second_paper(arch, sizes, expected):
    arch = replace(arch, **sizes)
    norms = (2 * arch.num_layers + 1) * arch.hidden_size
    assert num_parameters(arch) - norms == expected


# arXiv:2407.14679, Table 19: layers, heads, ffn, hidden -> billions of parameters.
TABLE_19 = """
32,32,12800,5120,8.494 32,32,13824,4608,7.947 32,48,11520,4608,7.871 32,48,16384,4096,8.272
31,32,12800,5120,8.311 31,32,16128,4608,8.430 31,48,13824,4608,8.357 31,48,16384,4096,8.079
30,32,12800,5120,8.127 30,32,16128,4608,8.235 30,48,13824,4608,8.164 30,48,16384,4096,7.886
29,32,12800,5120,7.944 29,32,16128,4608,8.039 29,48,13824,4608,7.970
"""


@pytest.mark.parametrize("row", TABLE_19.split())
def test_parameter_counts_of_the_candidates(row):
    layers, heads, ffn, hidden, billions = row.split(",")
    arch = replace(
        NEMOTRON_15B,
        num_layers=int(layers),
        num_attention_heads=int(heads),
        ffn_hidden_size=int(ffn),
        hidden_size=int(hidden),
    )
    assert f"{num_parameters(arch) / 1e9:.3f}" == billions


def test_non_embedding_parameters():
    without = num_parameters(NEMOTRON_15B, embeddings=False)
    assert without == 15_628_775_424 - 2 * 256000 * 6144


MIXTRAL_8X7B = Arch(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    max_position_embeddings=32768,
    vocab_size=32000,
    padded_vocab_size=32000,
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
    num_experts=8,
    moe_router_topk=2,
    moe_ffn_hidden_size=14336,
)
QWEN3_30B_A3B = replace(
    MIXTRAL_8X7B,
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_query_groups=4,
    vocab_size=151936,
    padded_vocab_size=151936,
    qk_layernorm=True,
    num_experts=128,
    moe_router_topk=8,
    moe_ffn_hidden_size=768,
)


def test_parameter_counts_of_mixtures_of_experts():
    """The totals are those of the models' own checkpoints."""
    assert num_parameters(MIXTRAL_8X7B) == 46_702_792_704
    assert num_parameters(MIXTRAL_8X7B, active=True) == 12_879_925_248
    assert num_parameters(QWEN3_30B_A3B) == 30_532_122_624
    unused = 48 * (128 - 8) * 3 * 768 * 2048
    assert num_parameters(QWEN3_30B_A3B, active=True) == 30_532_122_624 - unused
    shared = replace(MIXTRAL_8X7B, moe_shared_expert_intermediate_size=100)
    for active in (True, False):
        more = num_parameters(shared, active=active) - num_parameters(MIXTRAL_8X7B, active=active)
        assert more == 32 * 3 * 100 * 4096


def test_flops_count_the_experts_that_compute_a_token():
    arch = MIXTRAL_8X7B
    norms = (2 * arch.num_layers + 1) * arch.hidden_size
    vocabulary = arch.padded_vocab_size * arch.hidden_size
    matrices = num_parameters(arch, active=True) - norms - vocabulary
    assert forward_flops(arch, 64) == 2 * (matrices + arch.num_layers * 32 * 128 * 64)


def test_saved_args_of_experts_that_megatron_writes_otherwise():
    args = MIXTRAL_8X7B.to_args() | {
        "moe_ffn_hidden_size": None,
        "moe_router_load_balancing_type": ["seq_aux_loss"],
        "moe_aux_loss_coeff": [0.01],
        "moe_layer_freq": [1] * 32,
        "moe_router_score_function": "softmax",
    }
    balanced = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.01}
    assert Arch.from_args(args) == replace(MIXTRAL_8X7B, **balanced)
    plain = NEMOTRON_15B.to_args() | {"moe_ffn_hidden_size": 8, "moe_aux_loss_coeff": 0.01}
    assert Arch.from_args(plain) == NEMOTRON_15B


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2; only 1"),
        ({"moe_layer_freq": [0, 1]}, "moe_layer_freq is"),
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function is sigmoid"),
        ({"moe_shared_expert_gate": True}, "moe_shared_expert_gate is True; only False"),
        ({"moe_router_num_groups": 4}, "moe_router_num_groups is 4"),
        ({"moe_aux_loss_coeff": [0.1, 0.2]}, "only one loss"),
        ({"moe_router_load_balancing_type": "global_aux_loss"}, "global_aux_loss: only aux_loss,"),
        ({"add_bias_linear": True}, "--num-experts needs --disable-bias-linear"),
    ],
)
def test_experts_that_are_not_built_are_refused_by_name(saved, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Arch.from_args(MIXTRAL_8X7B.to_args() | saved)


@pytest.mark.parametrize(
    "change", [{}, {"num_query_groups": 48}, {"position_embedding_type": "learned_absolute"}]
)
def test_round_trip_through_saved_args(change):
    arch = replace(NEMOTRON_15B, **change)
    assert Arch.from_args(arch.to_args()) == arch


EIGHT = replace(NEMOTRON_15B, num_layers=8, rotary_percent=1.0)
WINDOWS = {"window_size": "127,0", "window_attn_skip_freq": "[1,1,1,0,1,1,1,0]"}


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ({"window_size": (127, 0), "window_attn_skip_freq": 4}, WINDOWS),
        ({"window_size": [127, 0], "window_attn_skip_freq": [1, 1, 1, 0] * 2}, WINDOWS),
        ({"window_size": "(127,0)", "window_attn_skip_freq": "([1]*3+[0])*2"}, WINDOWS),
        ({"window_size": (127, 0), "window_attn_skip_freq": [1] * 8}, {"window_size": "127,0"}),
        ({"window_attn_skip_freq": 4}, {}),
        ({"no_rope_freq": 4}, {"no_rope_freq": "[0,0,0,1,0,0,0,1]"}),
        ({"no_rope_freq": [0, 1] * 4}, {"no_rope_freq": "[0,1,0,1,0,1,0,1]"}),
        ({"no_rope_freq": 0}, {}),
        ({"no_rope_freq": [0] * 8}, {}),
    ],
)
def test_layers_that_differ_in_the_forms_that_megatron_saves(saved, expected):
    arch = replace(EIGHT, **expected)
    assert Arch.from_args(EIGHT.to_args() | saved) == arch
    assert Arch.from_args(arch.to_args()) == arch


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"no_rope_freq": [0, 1]}, "--no-rope-freq [0, 1]: write a frequency, or a 0 or 1 for eac"),
        ({"no_rope_freq": "exit()"}, "--no-rope-freq exit()"),
        ({"no_rope_freq": [0, 2] * 4}, "--no-rope-freq [0, 2"),
        ({"window_size": (127, 5)}, "--window-size (127, 5): write N,0"),
        ({"window_size": (-1, 0)}, "--window-size (-1, 0): write N,0"),
        ({"position_embedding_type": "yarn", "rotary_percent": 0.5}, "--rotary-percent 0.5"),
        ({"position_embedding_type": "yarn", "use_rope_scaling": True}, "--use-rope-scaling"),
    ],
)
def test_layers_that_cannot_be(saved, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Arch.from_args(EIGHT.to_args() | saved)


def test_some_layers_take_their_own_settings_along():
    arch = replace(EIGHT, **WINDOWS, no_rope_freq="[0,1,0,0,0,1,0,0]")
    some = arch.with_layers([0, 1, 3, 7])
    assert (some.num_layers, some.no_rope_freq) == (4, "[0,1,0,0]")
    assert some.window_attn_skip_freq == "[1,1,0,0]"
    assert arch.with_layers([0, 2]) == replace(EIGHT, num_layers=2, window_size="127,0")


def test_flops_of_windows():
    """A window of 4 tokens, of 10: 1 + 2 + 3 + 7 times 4 keys in place of 55, about."""
    full = replace(EIGHT, num_layers=2)
    some = replace(full, window_size="3,0", window_attn_skip_freq="[1,0]")
    saved = forward_flops(full, 10) - forward_flops(some, 10)
    assert saved == 2 * 48 * 128 * (10 - 4) ** 2 // 10


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
        ({"num_experts": 4}, "--num-experts needs --moe-ffn-hidden-size"),
        ({"num_experts": 0}, "--num-experts must be >= 1: 0"),
        ({"moe_ffn_hidden_size": 8}, "--moe-ffn-hidden-size needs --num-experts"),
        ({"num_experts": 2, "moe_ffn_hidden_size": 8, "moe_router_topk": 3}, "3 is more than"),
        ({"num_experts": 2, "moe_ffn_hidden_size": 8, "moe_router_topk": 1}, "pre-softmax"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(NEMOTRON_15B, **change)


def test_gated_mlp_biases_and_qk_norms_have_rows():
    changed = {"swiglu": True, "squared_relu": False, "add_qkv_bias": True, "qk_layernorm": True}
    arch = replace(NEMOTRON_15B, **changed)
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


def test_two_activations_contradict_each_other():
    """In saved args too, not only where both are typed."""
    with pytest.raises(ValueError, match="--swiglu and --squared-relu contradict each other"):
        Arch.from_args(NEMOTRON_15B.to_args() | {"swiglu": True})


def test_no_size_is_lost_between_files_of_nemo_and_bridge():
    """A new size has a name in their files, or is one of those that ``args_of`` finds otherwise.

    Without, a model that has it would be read as one that has it not.
    """
    activations = {"squared_relu", "geglu", "bias_gelu_fusion"}  # with swiglu one function
    derived = {
        *("padded_vocab_size", "untie_embeddings_and_output_weights", "rotary_base"),
        *("use_rope_scaling", "rope_scaling_factor"),
    }
    of_bert = {"bert_binary_head", "num_tokentypes", "apply_residual_connection_post_layernorm"}
    # Ours: megatron-core has no such setting, and their files say nothing of it.
    ours = {"by_layer", "embedding_multiplier", "logits_scaling", "residual_multiplier"}
    ours |= {"rotary_base_local", "sandwich_norm"}
    sizes = {f.name for f in fields(Arch) if not f.name.startswith("moe_")}
    assert sizes - foreign_args.NAMES.keys() == activations | derived | of_bert | ours
