"""tools/inspect_checkpoint.py describes a checkpoint and the model it was pruned from."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest

from megatron_ext.arch import num_parameters
from megatron_ext.checkpoint import checkpoints, writer
from megatron_ext.model.build import build_model, model_state_dict
from megatron_ext.model.config import ModelOptions
from megatron_ext.pruning.planner import make_plan
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import UserError
from tests.models import LLAMA
from tests.ranks import run_ranks
from tools import inspect_checkpoint


def _write(folder):
    """Write a model of LLAMA's sizes with the plan that keeps all of it."""
    place = platform.initialize()
    state = model_state_dict(build_model(LLAMA, ModelOptions(), place.groups, seed=1))
    common = {"args": Namespace(**LLAMA.to_args()), "iteration": 0}
    plan = make_plan(None, LLAMA, LLAMA)
    files = {"plan.json": plan.to_json()}
    writer.save(folder, checkpoints.RELEASE, state | common, files=files)


def test_text_and_json(tmp_path, capsys):
    run_ranks(1, _write, str(tmp_path))
    inspect_checkpoint.main(["--load", str(tmp_path), "--tensors"])
    text = capsys.readouterr().out
    assert f"{num_parameters(LLAMA):,}" in text
    assert "hidden_size                            48 -> 48" in text
    assert "layers kept, from 0                    0 1 2 3" in text
    assert "decoder.layers.mlp.linear_fc1.weight" in text
    assert "moe_" not in text
    assert "[4, 160, 48]" in text
    inspect_checkpoint.main(["--load", str(tmp_path), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["parameters"] == num_parameters(LLAMA)
    assert said["arch"] == replace(LLAMA).__dict__ | {"by_layer": []}
    assert said["tensors"]["output_layer.weight"] == {"shape": [104, 48], "dtype": "float32"}
    assert said["plan"]["layers"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("argv", "words"),
    [([], "missing --load"), (["--load", "nowhere"], "no finished checkpoint")],
)
def test_bad_input(argv, words):
    with pytest.raises(UserError, match=words):
        inspect_checkpoint.main(argv)
