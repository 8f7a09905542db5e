"""Folders that are no language model of a known family: the line says what they are."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_ext.convert.config import arch_of
from megatron_ext.convert.families import FAMILIES
from megatron_ext.convert.hf_folder import HfFolder
from megatron_ext.convert.importer import other_kind
from megatron_ext.runtime.errors import CHECKPOINT, UserError
from tests.programs import run_here

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
KINDS = {
    "model.layers.4.mlp.up_proj.weight": "hold 5 layers, config.json says num_hidden_layers 2",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": "an adapter",
    "score.weight": "a head of LlamaForSequenceClassification; only LlamaForCausalLM",
    "v_head.summary.weight": "a head of LlamaForSequenceClassification",
    "language_model.model.embed_tokens.weight": "a model of pictures and text",
    "model.visual.patch_embed.weight": "a model of pictures and text",
}


@pytest.mark.parametrize("name", KINDS)
def test_the_line_says_what_the_folder_is(tmp_path, name):
    config = {**LLAMA, "architectures": ["LlamaForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({name: torch.ones(2)}, tmp_path / "model.safetensors")
    found = other_kind(HfFolder(tmp_path), FAMILIES["llama"], arch_of(LLAMA))
    assert KINDS[name] in found


def test_an_adapter_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"merge_and_unload\(\) and save_pretrained\(\)\.$"):
        HfFolder(tmp_path)


def test_a_name_of_the_hub_is_no_folder(tmp_path):
    flags = ["--hf", "meta-llama/Llama-3.2-1B", "--save", str(tmp_path / "out")]
    code, _, line = run_here(["tools/convert.py", "import", *flags])
    assert code == CHECKPOINT
    assert "a folder on this machine is wanted: hf download meta-llama/Llama-3.2-1B" in line


def test_no_message_ends_in_two_full_stops():
    assert str(UserError("config.json: too short..")) == "config.json: too short."
    assert str(UserError("and so on...")) == "and so on..."
