"""FP8: what reaches megatron-core of each model, and what is refused. No GPU runs here."""

from dataclasses import asdict, replace

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_ext.cli.megatron_flags import TrainParallel
from megatron_ext.model import fp8
from megatron_ext.model.config import ModelOptions, transformer_config
from megatron_ext.model.fp8 import Fp8
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import USAGE, UserError
from tests.models import BERT, LLAMA, MOE
from tests.programs import data_flags, fail, write_corpus, write_model
from tests.ranks import run_ranks

HYBRID = Fp8(fp8_format="hybrid", fp8_recipe="tensorwise")
# Sizes that FP8 takes on one rank and on two.
FITTING = replace(LLAMA, hidden_size=64, ffn_hidden_size=96, num_query_groups=2)


def test_defaults_are_those_of_megatron():
    settings = fp8.of_student(Fp8(fp8_format="e4m3"))
    default = {f.name: f.default for f in TransformerConfig.__dataclass_fields__.values()}
    assert settings.pop("fp8") == "e4m3"
    assert settings == {name: default[name] for name in settings}
    assert fp8.of_student(Fp8()) == fp8.of_teacher(Fp8()) == {}


@pytest.mark.parametrize(
    ("typed", "student", "teacher"),
    [
        ({"fp8_format": "hybrid"}, ("hybrid", "delayed"), ("hybrid", "tensorwise")),
        (
            {"fp8_format": "e4m3", "fp8_recipe": "blockwise"},
            ("e4m3", "blockwise"),
            ("e4m3", "blockwise"),
        ),
        (
            {"fp8_format": "hybrid", "teacher_fp8_format": "e4m3"},
            ("hybrid", "delayed"),
            ("e4m3", "tensorwise"),
        ),
        ({"fp8_format": "hybrid", "teacher_fp8_format": "none"}, ("hybrid", "delayed"), None),
        ({"teacher_fp8_format": "e4m3"}, None, ("e4m3", "tensorwise")),
    ],
)
def test_each_model_has_its_own_format(typed, student, teacher):
    for settings, expected in (
        (fp8.of_student(Fp8(**typed)), student),
        (fp8.of_teacher(Fp8(**typed)), teacher),
    ):
        found = (settings["fp8"], settings["fp8_recipe"]) if settings else None
        assert found == expected


def configs(fp8_settings):
    groups = platform.initialize().groups
    options = ModelOptions(
        params_dtype=torch.bfloat16, fp8=fp8_settings, settings={"cp_comm_type": "a2a"}
    )
    config = transformer_config(FITTING, options, groups)
    return {name: getattr(config, name) for name in (*fp8_settings, "cp_comm_type")}


def test_settings_reach_megatron_cores_configuration():
    typed = replace(
        HYBRID, fp8_margin=1, fp8_amax_history_len=7, fp8_amax_compute_algo="max", fp8_wgrad=False
    )
    typed = replace(typed, first_last_layers_bf16=True, num_layers_at_start_in_bf16=2)
    settings = fp8.of_student(typed)
    assert run_ranks(1, configs, settings)[0] == settings | {"cp_comm_type": "a2a"}
    assert settings.items() >= {"fp8_margin": 1, "num_layers_at_start_in_bf16": 2}.items()


PLAIN = {"bf16": True, "distributed": False, "has_teacher": True}


@pytest.mark.parametrize(
    ("typed", "run", "words"),
    [
        ({"fp8_margin": 2}, {}, "--fp8-margin 2 needs --fp8-format"),
        ({"fp8_wgrad": False}, {}, "--no-fp8-wgrad needs --fp8-format"),
        ({"first_last_layers_bf16": True}, {}, "--first-last-layers-bf16 needs --fp8-format"),
        ({"teacher_fp8_format": "e4m3"}, {"has_teacher": False}, "needs --teacher-load"),
        (
            {"fp8_format": "e4m3", "first_last_layers_bf16": True},
            {},
            "needs another --fp8-recipe than delayed",
        ),
        ({"fp8_format": "e4m3", "fp8_param_gather": True}, {}, "--use-distributed-optimizer"),
        (
            {"fp8_format": "e4m3", "fp8_param_gather": True},
            {"distributed": True, "bf16": False},
            "--bf16",
        ),
        (
            {"fp8_format": "e4m3", "fp8_param_gather": True, "fp8_recipe": "mxfp8"},
            {"distributed": True},
            "mxfp8 is not supported",
        ),
    ],
)
def test_flags_that_do_not_go_together(typed, run, words):
    (problem,) = fp8.problems(Fp8(**typed), **(PLAIN | run))
    assert words in problem


def test_flags_that_do():
    for typed in (
        Fp8(),
        HYBRID,
        replace(HYBRID, first_last_layers_bf16=True, num_layers_at_end_in_bf16=3),
        replace(HYBRID, fp8_param_gather=True),
        Fp8(teacher_fp8_format="e4m3", first_last_layers_bf16=True),
    ):
        assert not list(fp8.problems(typed, **(PLAIN | {"distributed": True})))


def check(arch, settings=HYBRID, teacher=None, tokens=128, has_weights=True, **layout):
    parallel = TrainParallel(**layout)
    fp8.check_models(settings, arch, teacher, parallel, tokens=tokens, has_weights=has_weights)


TP2 = {"tensor_model_parallel_size": 2}
SMALL_MOE = replace(
    MOE,
    hidden_size=32,
    kv_channels=16,
    moe_ffn_hidden_size=48,
    moe_shared_expert_intermediate_size=32,
)


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        ({"hidden_size": 100}, {}, "--hidden-size 100 must be a multiple of 16; .* 96 and 112"),
        ({"hidden_size": 8}, {}, "--hidden-size 8 must be a multiple of 16; .* 16"),
        ({"ffn_hidden_size": 80}, TP2, "--ffn-hidden-size 80 .* of 32 over 2 .* 64 and 96"),
        (
            {"kv_channels": 24, "num_attention_heads": 3, "num_query_groups": 3},
            {},
            "--num-attention-heads 3 must be a multiple of 2; .* 2 and 4",
        ),
        (
            {"kv_channels": 12, "num_attention_heads": 4, "num_query_groups": 1},
            {},
            "--num-query-groups 1 must be a multiple of 2; .* 2",
        ),
        ({}, {"tokens": 40}, "40 tokens must be a multiple of 16"),
        # Regression: its local layers left FP8 out without a word.
        (vars(BERT), {}, "a BertModel has local layers here, which have no FP8"),
        (
            {},
            {"tokens": 48, "sequence_parallel": True} | TP2,
            "48 tokens must be a multiple of 32",
        ),
        (
            {"hidden_size": 80},
            {"settings": replace(HYBRID, fp8_recipe="mxfp8")},
            "--hidden-size 80 must be a multiple of 32; .* 64 and 96",
        ),
        (
            {},
            {"settings": replace(HYBRID, fp8_recipe="blockwise"), "sequence_parallel": True} | TP2,
            "--hidden-size 64 must be a multiple of 128",
        ),
        (
            {},
            {"teacher": replace(FITTING, ffn_hidden_size=100)},
            "--ffn-hidden-size 100 of the teacher .* 96 and 112",
        ),
        (
            {},
            {
                "settings": replace(
                    HYBRID, first_last_layers_bf16=True, num_layers_at_end_in_bf16=3
                ),
                "pipeline_model_parallel_size": 2,
            },
            "--num-layers-at-end-in-bf16 3: a pipeline stage has 2 layers",
        ),
        (
            {},
            {"settings": replace(HYBRID, fp8_param_gather=True), "has_weights": False},
            "--fp8-param-gather: new weights",
        ),
    ],
)
def test_sizes_that_fp8_cannot_run(change, arguments, words):
    with pytest.raises(UserError, match=words) as raised:
        check(replace(FITTING, **change), **arguments)
    assert raised.value.code == USAGE
    assert "\n" not in str(raised.value)


def test_sizes_of_experts():
    check(SMALL_MOE)
    words = "--moe-ffn-hidden-size 22 must be a multiple of 16; the nearest are 16 and 32"
    with pytest.raises(UserError, match=words):
        check(replace(SMALL_MOE, moe_ffn_hidden_size=22))


def test_sizes_that_it_can():
    check(FITTING)
    check(FITTING, **TP2, sequence_parallel=True)
    check(replace(FITTING, hidden_size=128), replace(HYBRID, fp8_recipe="mxfp8"))
    odd = replace(FITTING, hidden_size=100)
    check(odd, Fp8(teacher_fp8_format="e4m3"), teacher=FITTING)
    check(FITTING, replace(HYBRID, teacher_fp8_format="none"), teacher=odd)
    check(odd, Fp8())


def test_programs_refuse_fp8_without_a_gpu_and_sizes_that_do_not_fit(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", FITTING.vocab_size)
    for name, arch in (("fits", FITTING), ("odd", replace(LLAMA, hidden_size=40))):
        write_model(str(tmp_path / name), arch)
    argv = ["--micro-batch-size", "1", "--seq-length", "32", "--train-iters", "1", "--lr", "1e-3"]
    argv += [*data_flags(FITTING, corpus), "--load", str(tmp_path / "fits"), "--device", "cpu"]
    code, line = fail("pretrain_distill", [*argv, "--fp8-format", "hybrid"])
    assert code == USAGE
    assert "--fp8-format hybrid needs a GPU with Transformer Engine" in line
    argv += ["--teacher-load", str(tmp_path / "odd"), "--teacher-fp8-format", "e4m3"]
    code, line = fail("pretrain_distill", argv)
    assert code == USAGE
    assert "--hidden-size 40 of the teacher must be a multiple of 16; the nearest are 32" in line


class Fp8Parameter(nn.Parameter):
    """As Transformer Engine's, which remembers what it was made of."""

    def get_high_precision_init_val(self):
        return self._high_precision_init_val


def test_an_optimizer_begins_with_the_weights_before_their_rounding():
    parameter = Fp8Parameter(torch.tensor([1.0, 2.0]))
    parameter._high_precision_init_val = torch.tensor([float("nan")] * 2)
    other = nn.Parameter(torch.zeros(1))
    loaded = {"weight": torch.tensor([1.01, 2.02]), "bias": torch.zeros(1)}
    fp8.keep_exact_weights(iter([("weight", parameter), ("bias", other)]), loaded)
    assert torch.equal(parameter.get_high_precision_init_val(), loaded["weight"])
    assert not hasattr(other, "_high_precision_init_val")


def test_flags_without_effect_are_said_to_be(capsys):
    from megatron_ext.model.options import _check_attention

    parallel = TrainParallel(attention_backend="flash")
    _check_attention(parallel, "local", has_masks=True)
    assert "--attention-backend flash: without effect" in capsys.readouterr().err
    with pytest.raises(UserError, match="--reset-attention-mask"):
        _check_attention(parallel, "transformer_engine", has_masks=True)
    assert asdict(parallel)["cp_comm_type"] == "p2p"
