"""Model Optimizer's distillation file, key by key."""

import pytest
import yaml

from megatron_ext.cli.modelopt_yaml import READERS, read_kd_cfg
from megatron_ext.cli.programs import parse_train
from megatron_ext.runtime.errors import USAGE, UserError

WHOLE = {
    "logit_layers": ["output_layer", "output_layer"],
    "intermediate_layer_pairs": [
        ["decoder.layers.13", "decoder.layers.29"],
        ["decoder.layers.3.self_attention", "decoder.layers.7.self_attention", "cosine"],
    ],
    "skip_lm_loss": True,
    "kd_loss_scale": 1.0,
    "logit_kl_temperature": 2.0,
    "logit_kl_topk": 1024,
}


def write(folder, values):
    path = folder / "kd.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_every_key_becomes_a_flag_and_typed_flags_win(tmp_path):
    assert WHOLE.keys() == READERS.keys()
    assert read_kd_cfg(write(tmp_path, WHOLE)) == {
        "kd_hidden_states": "29:13,attention:7:3",  # teacher first here
        "kd_hidden_loss": "cosine",
        "kd_temperature": 2.0,
        "kd_top_k": 1024,
    }
    argv = "--load s --teacher-load t --skip-train --mock-data --tokenizer-type NullTokenizer "
    argv += "--vocab-size 9 --micro-batch-size 1 --seq-length 8 --kd-top-k 7 --export-kd-cfg "
    distill = parse_train([*argv.split(), str(tmp_path / "kd.yaml")], 1).distill
    assert (distill.kd_temperature, distill.kd_top_k) == (2.0, 7)
    assert distill.kd_hidden_states == "29:13,attention:7:3"


@pytest.mark.parametrize(
    ("student", "teacher", "pair"),
    [
        ("decoder.layers.3", "decoder.layers.7", "7:3"),
        ("decoder.layers.3.pre_mlp_layernorm", "decoder.layers.7.pre_mlp_layernorm", "mlp:7:3"),
        (
            "decoder.layers.3.self_attention.linear_proj",
            "decoder.layers.7.self_attention",
            "attention:7:3",
        ),
        ("decoder.layers.3.input_layernorm", "decoder.layers.7.input_layernorm", "6:2"),
        ("decoder.layers.3.input_layernorm", "decoder.layers.7", "7:2"),
        ("decoder.layers.0.input_layernorm", "decoder.layers.0.input_layernorm", "embedding"),
        ("decoder.layers.0.input_layernorm", "embedding", "embedding"),
        ("decoder.final_layernorm", "decoder.final_layernorm", "last:last"),
        # Of Megatron-LM's documentation.
        ("decoder.final_layernorm", "decoder.layers.30.input_layernorm", "29:last"),
    ],
)
def test_names_of_states(student, teacher, pair, tmp_path):
    """The output of a module of megatron-core is the state that the grammar names."""
    values = {"intermediate_layer_pairs": [[student, teacher]]}
    assert read_kd_cfg(write(tmp_path, values))["kd_hidden_states"] == pair


def test_its_defaults_are_those_here(tmp_path):
    defaults = {"intermediate_layer_pairs": [], "logit_kl_topk": None, "skip_lm_loss": True}
    assert read_kd_cfg(write(tmp_path, defaults)) == {}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": 2}, ["temperature: not known", "logit_kl_temperature"]),
        ({"logit_kl_temperature": 0}, ["logit_kl_temperature: 0", "above 0"]),
        ({"logit_kl_topk": 0}, ["logit_kl_topk: 0"]),
        ({"skip_lm_loss": False}, ["skip_lm_loss: False", "--kd-lm-loss-weight"]),
        ({"kd_loss_scale": 2.0}, ["kd_loss_scale: 2.0"]),
        ({"logit_layers": ["lm_head", "lm_head"]}, ["logit_layers"]),
        ({"intermediate_layer_pairs": [["decoder.layers.3"]]}, ["student layer, teacher layer"]),
        (
            {"intermediate_layer_pairs": [["decoder.layers.3", "decoder.layers.3.mlp"]]},
            ["decoder.layers.3.mlp is none of"],
        ),
        *(
            (
                {"intermediate_layer_pairs": [["decoder.layers.0", name]]},
                [f"{name} is none of", "decoder.final_layernorm"],
            )
            for name in ("encoder.layers.0", "output_layer", "decoder.layers.0.mlp.linear_fc2", 3)
        ),
        *(
            (
                {"intermediate_layer_pairs": [["decoder.layers.0", name]]},
                ["are different places"],
            )
            for name in ("embedding", "decoder.layers.0.input_layernorm")
        ),
        (
            {
                "intermediate_layer_pairs": [
                    ["decoder.layers.1", "decoder.layers.1", "mse"],
                    ["decoder.layers.2", "decoder.layers.2"],
                ]
            },
            ["one loss"],
        ),
        ([1], ["needs lines like"]),
    ],
)
def test_what_is_refused(values, words, tmp_path):
    path = write(tmp_path, values)
    with pytest.raises(UserError) as error:
        read_kd_cfg(path)
    assert error.value.code == USAGE
    assert all(word in str(error.value) for word in [*words, f"--export-kd-cfg {path}"])
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--export-kd-cfg .*none\.yaml cannot be read"):
        read_kd_cfg(tmp_path / "none.yaml")
