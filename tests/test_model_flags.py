"""The model's sizes on the command line: defaults, a checkpoint's sizes, layouts, targets."""

from dataclasses import replace

import pytest

from megatron_ext.arch import Arch
from megatron_ext.cli.fit import (
    check_experts,
    check_layout,
    check_targets,
    pipeline_layout,
    virtual_pipeline_size,
)
from megatron_ext.cli.flag_checks import stages
from megatron_ext.cli.megatron_flags import TrainParallel
from megatron_ext.cli.method_flags import Prune
from megatron_ext.cli.programs import check_against_checkpoint, megatron_command_line, new_arch
from megatron_ext.pruning.targets import target_arch
from megatron_ext.runtime.errors import CHECKPOINT, UserError
from tests.test_flags import NEW, refused, train

ARCH = Arch(
    num_layers=6,
    hidden_size=96,
    ffn_hidden_size=160,
    num_attention_heads=12,
    num_query_groups=4,
    kv_channels=10,
    max_position_embeddings=64,
    vocab_size=250,
    padded_vocab_size=256,
    position_embedding_type="rope",
)

EXPERTS = {"num_experts": 6, "moe_ffn_hidden_size": 20, "add_bias_linear": False}


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("", {"ffn_hidden_size": 384, "kv_channels": 16, "num_query_groups": 6}),
        ("--swiglu", {"ffn_hidden_size": 256}),
        ("--hidden-size 102 --swiglu", {"ffn_hidden_size": 256, "kv_channels": 17}),
        ("--num-query-groups 3", {"num_query_groups": 6}),
        ("--num-query-groups 3 --group-query-attention", {"num_query_groups": 3}),
        ("--group-query-attention", {"num_query_groups": 1}),
        ("--kv-channels 5 --ffn-hidden-size 7", {"ffn_hidden_size": 7, "kv_channels": 5}),
        ("", {"vocab_size": 129, "padded_vocab_size": 256}),
        ("--make-vocab-size-divisible-by 43", {"padded_vocab_size": 129}),
        (
            "--num-experts 4 --disable-bias-linear --ffn-hidden-size 50 --moe-router-topk 3",
            {"num_experts": 4, "moe_ffn_hidden_size": 50, "moe_router_topk": 3},
        ),
    ],
)
def test_sizes_of_a_new_model(typed, expected):
    flags = train(f"--mock-data {NEW} {typed}")
    arch = new_arch(flags.sizes, 129)
    assert {name: getattr(arch, name) for name in expected} == expected


def test_bad_sizes_of_a_new_model():
    sizes = train(f"--mock-data {NEW}").sizes
    with refused("--hidden-size 97 is not a multiple of --num-attention-heads 6"):
        new_arch(sizes | {"hidden_size": 97}, 10)
    with refused("--num-attention-heads 6 is not a multiple of --num-query-groups 4"):
        new_arch(sizes | {"group_query_attention": True, "num_query_groups": 4}, 10)
    with refused("a new model needs --num-layers, --max-position-embeddings."):
        new_arch({"hidden_size": 8, "num_attention_heads": 2}, 10)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_query_groups": 12, "swiglu": True, "untie_embeddings_and_output_weights": True},
        {"padded_vocab_size": 250, "add_bias_linear": False, "add_qkv_bias": True},
        {"vocab_size": 50257, "padded_vocab_size": 50304, "norm_epsilon": 1e-6},
        {"normalization": "RMSNorm", "rotary_base": 500000, "rotary_percent": 0.5},
        {"rotary_seq_len_interpolation_factor": 4, "rotary_interleaved": True},
        {"window_size": "127,0", "window_attn_skip_freq": "[1,0,1,0,1,0]"},
        {"no_rope_freq": "[0,0,1,0,0,1]"},
        {
            "position_embedding_type": "yarn",
            "rotary_scaling_factor": 8.0,
            "yarn_beta_fast": 16.0,
            "yarn_correction_range_round_to_int": False,
            "mscale": 0.5,
        },
        {"position_embedding_type": "none", "qk_layernorm": True, "hidden_dropout": 0.0},
        EXPERTS | {"moe_shared_expert_intermediate_size": 12, "moe_aux_loss_coeff": 0.01},
    ],
)
def test_megatron_command_line_gives_the_same_arch_again(change):
    arch = replace(ARCH, **change)
    sizes = train(f"--mock-data {megatron_command_line(arch)}").sizes
    assert new_arch(sizes, arch.vocab_size) == arch
    assert check_against_checkpoint(sizes, arch) == arch


def test_megatron_pads_the_vocabulary_to_the_same_size_under_tensor_parallelism():
    """Megatron-LM pads to make_vocab_size_divisible_by x TP."""
    arch = replace(ARCH, vocab_size=50257, padded_vocab_size=50304)
    words = megatron_command_line(arch).split()
    multiple = int(words[words.index("--make-vocab-size-divisible-by") + 1])
    for tp in (1, 2, 4, 8):
        assert -(-50257 // (multiple * tp)) * multiple * tp == 50304


def test_sizes_that_contradict_the_checkpoint_come_as_a_table():
    typed = "--hidden-size 128 --swiglu --disable-bias-linear --num-layers 6 --hidden-dropout 0.5"
    with pytest.raises(UserError) as caught:
        check_against_checkpoint(train(f"--mock-data {typed}").sizes, ARCH)
    assert caught.value.code == CHECKPOINT
    assert str(caught.value).splitlines() == [
        "the checkpoint has other sizes; drop these flags to use the checkpoint's:",
        "  flag                   checkpoint  command line",
        "  --hidden-size          96          128",
        "  --disable-bias-linear  off         on",
        "  --swiglu               off         on",
    ]


def test_typed_dropouts_and_load_balancing_win_over_the_checkpoint():
    typed = {"hidden_dropout": 0.0, "make_vocab_size_divisible_by": 7, "hidden_size": 96}
    assert check_against_checkpoint(typed, ARCH) == replace(ARCH, hidden_dropout=0.0)
    with refused("--moe-aux-loss-coeff needs --num-experts"):
        check_against_checkpoint({"moe_aux_loss_coeff": 0.1}, ARCH)
    mixture = replace(ARCH, **EXPERTS)
    balanced = replace(mixture, moe_aux_loss_coeff=0.1)
    assert check_against_checkpoint({"moe_aux_loss_coeff": 0.1}, mixture) == balanced
    one_group_per_head = replace(ARCH, num_query_groups=12)
    typed = {"group_query_attention": True, "num_query_groups": 12}
    assert check_against_checkpoint(typed, one_group_per_head) == one_group_per_head
    with refused("--group-query-attention  off         on", CHECKPOINT):
        check_against_checkpoint({"group_query_attention": True}, one_group_per_head)


@pytest.mark.parametrize(
    ("parallel", "change", "message"),
    [
        (
            {"tensor_model_parallel_size": 8},
            {},
            "8 does not divide --num-attention-heads, 12; this",
        ),
        ({"tensor_model_parallel_size": 3}, {}, "3 does not divide --num-query-groups, 4; this"),
        ({"tensor_model_parallel_size": 3}, {}, "this model allows 1, 2, 4."),
        ({"tensor_model_parallel_size": 4}, {"ffn_hidden_size": 6}, "--ffn-hidden-size, 6; this"),
        ({"tensor_model_parallel_size": 4}, {"padded_vocab_size": 250}, "padded vocabulary"),
        (
            {"pipeline_model_parallel_size": 4},
            {},
            "6 layers are not a multiple of --pipeline-model",
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
            {},
            "--num-virtual-stages-per-pipeline-rank 2 does not divide the 3 layers",
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2},
            {},
            "--num-layers-per-virtual-pipeline-stage 2 does not divide the 3 layers",
        ),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Ett|t*3L"},
            {},
            "Ett|t*3L places 5 layers; the model has 6",
        ),
        (
            {"expert_model_parallel_size": 4},
            EXPERTS,
            "--expert-model-parallel-size 4 does not divide --num-experts 6",
        ),
        ({"tensor_model_parallel_size": 2}, EXPERTS, "with experts needs --sequence-parallel"),
        (
            {"tensor_model_parallel_size": 4, "sequence_parallel": True},
            EXPERTS | {"moe_ffn_hidden_size": 22},
            "4 does not divide --moe-ffn-hidden-size, 22",
        ),
        ({}, {"max_position_embeddings": 15}, "--seq-length 16 is longer than --max-position"),
        ({}, {"kv_channels": 9}, "--kv-channels 9 x --rotary-percent 1.0 = 9 channels"),
        ({}, {"rotary_percent": 0.05}, "--kv-channels 10 x --rotary-percent 0.05 = 0 channels"),
    ],
)
def test_layouts_that_do_not_fit_the_model(parallel, change, message):
    with refused(message):
        check_layout(replace(ARCH, **change), TrainParallel(**parallel), seq_length=16)


@pytest.mark.parametrize(
    ("first", "last", "pp", "num_layers", "expected"),
    [
        (1, None, 2, 3, "Et|ttL"),
        (None, 1, 2, 3, "Ett|tL"),
        (1, 0, 3, 4, "Et|ttt|L"),
        (2, 1, 4, 9, "Ett|ttt|ttt|tL"),
        (None, None, 2, 4, None),
    ],
)
def test_layers_of_the_first_and_the_last_stage(first, last, pp, num_layers, expected):
    parallel = TrainParallel(
        pipeline_model_parallel_size=pp,
        decoder_first_pipeline_num_layers=first,
        decoder_last_pipeline_num_layers=last,
    )
    assert pipeline_layout(parallel, num_layers) == expected
    check_layout(replace(ARCH, num_layers=num_layers), parallel, seq_length=16)


@pytest.mark.parametrize(("first", "last", "num_layers"), [(2, 1, 6), (6, 1, 6), (1, 2, 4)])
def test_layers_of_the_ends_that_leave_no_even_rest(first, last, num_layers):
    parallel = TrainParallel(
        pipeline_model_parallel_size=4,
        decoder_first_pipeline_num_layers=first,
        decoder_last_pipeline_num_layers=last,
    )
    with refused(f"--decoder-first-pipeline-num-layers {first} --decoder-last-pipeline-num-lay"):
        check_layout(replace(ARCH, num_layers=num_layers), parallel, seq_length=16)


def test_flags_of_experts_need_a_model_with_experts():
    mixture = replace(ARCH, **EXPERTS)
    for flag in ({"expert_model_parallel_size": 2}, {"moe_grouped_gemm": True}):
        with refused(f"--{next(iter(flag)).replace('_', '-')}: no model of this run has experts"):
            check_experts([ARCH, ARCH], TrainParallel(**flag))
        check_experts([ARCH, mixture], TrainParallel(**flag))
    check_experts([ARCH], TrainParallel())
    # A feed-forward size that no weight has is no reason to refuse a layout.
    sizes = TrainParallel(tensor_model_parallel_size=4, sequence_parallel=True)
    check_layout(replace(mixture, ffn_hidden_size=7), sizes, seq_length=16)


@pytest.mark.parametrize(
    ("parallel", "pieces"),
    [
        ({}, None),
        ({"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 3}, None),
        ({"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 3}, 3),
        ({"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 1}, None),
        ({"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}, 3),
        ({"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3}, None),
        ({"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "E|(t|)*6L"}, 2),
        ({"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "E|t*4|tt|L"}, None),
    ],
)
def test_layouts_that_fit_the_model_and_their_virtual_stages(parallel, pieces):
    check_layout(ARCH, TrainParallel(**parallel), seq_length=64)
    assert virtual_pipeline_size(TrainParallel(**parallel), ARCH.num_layers) == pieces


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("Et|tL", ["Et", "tL"]),
        ("Et*3|(tt|)*2,t|L", ["Ettt", "tt", "tt", "t", "L"]),
        ("E(t*2|)*2L", ["Ett", "tt", "L"]),
        ("E|(t)*12|L", ["E", "t" * 12, "L"]),
    ],
)
def test_layout_strings(layout, expected):
    assert stages(layout) == expected


@pytest.mark.parametrize(
    "layout", ["Et*3|(tt|)*2,t|L", "E(t*2|)*2L", "E||t*10,L", "Et|(tt|t|)*2tL"]
)
def test_layout_strings_mean_what_they_mean_to_megatron(layout):
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    letters = {"embedding": "E", "decoder": "t", "loss": "L"}
    theirs = PipelineParallelLayerLayout.parse_str_to_list(layout)
    assert stages(layout) == ["".join(letters[kind.name] for kind in stage) for stage in theirs]


def checked_targets(prune):
    """Prune's flags -> the targets that pruning ARCH would have, checked."""
    target = target_arch(ARCH, **prune.target_sizes())
    check_targets(ARCH, [target], prune)
    return target


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"target_hidden_size": 97}, "--target-hidden-size 97: choose from 1 to the checkpoint's"),
        ({"target_ffn_hidden_size": 161}, "--target-ffn-hidden-size 161: choose from 1 to"),
        ({"target_num_layers": 7}, "--target-num-layers 7: choose from 1 to the checkpoint's 6"),
        ({"target_num_attention_heads": 13}, "--target-num-attention-heads 13: choose from 1 to"),
        (
            {"target_num_attention_heads": 4, "head_residual": "laco"},
            "--head-residual laco folds a pruned head into each kept one",
        ),
        ({"depth_block": 6}, "--depth-block 6: the checkpoint has only 6 layers"),
        (
            {"target_num_layers": 3, "depth_block": 2, "depth_rescore": True},
            "--target-num-layers 3 removes 3 of 6 layers, not a multiple of --depth-block 2",
        ),
    ],
)
def test_targets_that_cannot_be_cut(targets, message):
    with refused(message):
        checked_targets(Prune(**targets))


def test_targets_that_can_be_cut():
    assert checked_targets(Prune()) == ARCH
    target = checked_targets(Prune(target_hidden_size=96, target_num_attention_heads=8))
    assert target == replace(ARCH, num_attention_heads=8)


def test_a_model_of_one_layer_is_cut_in_width():
    """Blocks of one layer, the default, leave none where one goes; but none goes."""
    one = replace(ARCH, num_layers=1)
    prune = Prune(target_hidden_size=64)
    check_targets(one, [target_arch(one, **prune.target_sizes())], prune)
