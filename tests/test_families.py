"""Every family beside transformers: each size and each key of config.json at an unusual value.

A model is written in one direction and its logits are compared, or it is refused. Nothing may pass
that the two compute differently. Weights go through memory, not through a Megatron checkpoint.
"""

import json
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import transformers

from megatron_ext.arch import Arch, layer_key, names_on_disk, shape, weights
from megatron_ext.checkpoint.folder import Checkpoint
from megatron_ext.convert import exporter
from megatron_ext.convert.config import arch_of
from megatron_ext.convert.families import FAMILIES
from megatron_ext.convert.hf_folder import HfFolder
from megatron_ext.convert.importer import check_tensors, planned_share
from megatron_ext.convert.pieces import pieces
from megatron_ext.model.build import build_model, model_state_dict
from megatron_ext.model.config import ModelOptions
from megatron_ext.pruning.planner import make_plan
from megatron_ext.pruning.scores import Scores
from megatron_ext.pruning.trim import fill_trimmed
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import UserError
from tests.ranks import run_ranks

ROWS, POSITIONS = 61, 24
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
COMMON = {
    "vocab_size": ROWS,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "rope_theta": 10000.0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 12}
PADDED = {**GROUPED, "pad_token_id": 0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 20, "num_experts": 4}
GPT2 = {"vocab_size": ROWS, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
CONFIGS = {
    **dict.fromkeys(("llama", "granite", "qwen2", "qwen3", "nemotron"), GROUPED),
    "mistral": {**GROUPED, "sliding_window": None},
    **{
        name: {**GROUPED, "pad_token_id": 0}
        for name in ("phi3", "glm", "glm4", "smollm3", "ministral3", "gemma3_text")
    },
    "mixtral": {**GROUPED, "num_experts_per_tok": 2, "num_local_experts": 4},
    "qwen3_moe": {**GROUPED, **EXPERTS},
    "gpt2": GPT2,
    "nemotron_h": {
        **{
            name: GROUPED[name]
            for name in GROUPED
            if name not in ("num_hidden_layers", "rope_theta")
        },
        "hybrid_override_pattern": "M-*M",
        "mamba_num_heads": 6,
        "mamba_head_dim": 5,
        "n_groups": 3,
        "ssm_state_size": 7,
        "time_step_min": 1e-9,
    },
    **dict.fromkeys(("bert", "megatron-bert"), COMMON),
}
YARN = {
    "position_embedding_type": "yarn",
    "rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 6,
}
YARN_KEYS = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 6,
}
FULL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5}
LOCAL = {"rope_type": "default", "rope_theta": 99.0}
# Of a model's sizes: fields of ``Arch`` that are changed together.
CHANGES = [
    {"by_layer": (("ffn_hidden_size", (33, 35, 33, 35)),)},  # of a HybridModel only
    {"num_layers": 3},
    {"hidden_size": 42},
    {"hidden_size": 40},
    {"hidden_size": 42, "kv_channels": 10},
    {"hidden_size": 40, "kv_channels": 10},
    {"ffn_hidden_size": 33},
    {"num_attention_heads": 6},
    {"num_attention_heads": 6, "num_query_groups": 3},
    {"num_attention_heads": 6, "num_query_groups": 6, "kv_channels": 8},
    {"num_query_groups": 1},
    {"kv_channels": 18},
    {"kv_channels": 7},
    {"max_position_embeddings": 31},
    {"vocab_size": 50, "padded_vocab_size": 64},
    {"padded_vocab_size": 96},
    {"position_embedding_type": "learned_absolute"},
    {"position_embedding_type": "rope"},
    {"position_embedding_type": "none"},
    {"rotary_base": 77},
    {"rotary_percent": 0.5},
    {"rotary_percent": 0.75},
    {"rotary_percent": 1.0},
    {"use_rope_scaling": True},
    {"use_rope_scaling": True, "rope_scaling_factor": 3.0},
    {"rotary_interleaved": True},
    {"rotary_base_local": 99},
    {"rotary_seq_len_interpolation_factor": 3},
    YARN,
    {**YARN, "yarn_beta_fast": 4.0, "mscale": 0.0},
    {**YARN, "yarn_beta_slow": 0.4, "mscale": 0.7, "mscale_all_dim": 0.3},
    {**YARN, "yarn_correction_range_round_to_int": False, "mscale": 0.7},
    {"no_rope_freq": "[0,1]"},
    {"window_size": "5,0"},
    {"window_size": "5,0", "window_attn_skip_freq": "[0,1]"},
    {"window_size": "5,0", "window_attn_skip_freq": "[1,0]"},
    {"window_size": "5,0", "window_attn_skip_freq": "[0,0]"},
    {"window_size": "30,0"},
    {"softmax_scale": 0.7},
    {"embedding_multiplier": 3.0},
    {"residual_multiplier": 0.3},
    {"logits_scaling": 4.0},
    {"normalization": "LayerNorm"},
    {"normalization": "RMSNorm"},
    {"norm_epsilon": 0.1},
    {"sandwich_norm": True, "add_bias_linear": False},
    {"apply_layernorm_1p": True},
    {"swiglu": True, "squared_relu": False, "bias_gelu_fusion": False},
    {"swiglu": False, "squared_relu": True, "bias_gelu_fusion": False},
    {"swiglu": False, "squared_relu": False},
    {"geglu": True, "swiglu": False, "squared_relu": False, "bias_gelu_fusion": False},
    {"swiglu": False, "bias_gelu_fusion": True},
    {"add_bias_linear": True},
    {"add_bias_linear": False},
    {"add_qkv_bias": True},
    {"qk_layernorm": True},
    {"qk_layernorm": False},
    {"untie_embeddings_and_output_weights": True},
    {"untie_embeddings_and_output_weights": False},
    {"bert_binary_head": False},
    {"num_tokentypes": 3},
    {"apply_residual_connection_post_layernorm": True},
    {"apply_residual_connection_post_layernorm": False},
    {"num_experts": 3},
    {"num_experts": 4, "moe_ffn_hidden_size": 20, "add_bias_linear": False},
    {"moe_router_topk": 3},
    {"moe_ffn_hidden_size": 17},
    {"moe_ffn_hidden_size": 17, "ffn_hidden_size": 17},
    {"moe_shared_expert_intermediate_size": 14},
    {"moe_router_pre_softmax": True},
    {"moe_router_pre_softmax": False},
    {"moe_router_load_balancing_type": "none"},
    {"moe_aux_loss_coeff": 0.5},
    {"hybrid_layer_pattern": "*-*-", "num_layers": 4},
    {"hybrid_layer_pattern": "*--", "num_layers": 3},
    {"hybrid_layer_pattern": "MM-*-", "num_layers": 5},
    {"mamba_num_heads": 12},
    {"mamba_num_heads": 4, "mamba_num_groups": 1},
    {"mamba_head_dim": 4},
    {"mamba_num_groups": 2},
    {"mamba_state_dim": 11},
    {"init_method_std": 0.3},
    {"attention_dropout": 0.4},
    {"hidden_dropout": 0.4},
]
# Of a config.json, beside every key that the family's own class has.
KEYS = [
    {"partial_rotary_factor": 0.5},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    {"rope_parameters": {**LLAMA3, "rope_theta": 1e4}},
    {"rope_parameters": {**LLAMA3, "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 1.0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
    {"rope_parameters": YARN_KEYS},
    {"rope_parameters": {**YARN_KEYS, "beta_fast": 4, "beta_slow": 0.4, "truncate": False}},
    {"rope_parameters": {**YARN_KEYS, "mscale": 0.7, "mscale_all_dim": 0.3}},
    {"rope_parameters": {**YARN_KEYS, "mscale": 0.7}},
    {"rope_parameters": {**YARN_KEYS, "attention_factor": 1.0}},
    {"rope_parameters": {**YARN_KEYS, "attention_factor": 1.5}},
    {"rope_parameters": {**YARN_KEYS, "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    {"head_dim": 18},
    {"head_dim": None},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"attention_bias": True, "mlp_bias": True},
    {"sliding_window": 8},
    {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "use_sliding_window": True,
    },
    {"sliding_window": 8, "use_sliding_window": True, "no_rope_layer_interval": 2},
    {"no_rope_layer_interval": 2},
    {"sliding_window": 8, "sliding_window_pattern": 2},
    {"sliding_window_pattern": 2, "rope_local_base_freq": 99.0},
    {"sliding_window": 9, "rope_parameters": {"full_attention": FULL, "sliding_attention": LOCAL}},
    {"no_rope_layers": [0, 1]},
    {"hidden_act": "gelu"},
    {"hidden_act": "relu2"},
    {"activation_function": "gelu"},
    {"activation_function": "relu"},
    {"n_inner": 50},
    {"position_embedding_type": "relative_key"},
    {"norm_topk_prob": True},
    {"mlp_only_layers": [1]},
    {"decoder_sparse_step": 2},
    {"num_experts": 3},
    {"num_key_value_heads": None},
    {"num_key_value_heads": 4},
]


class Memory:
    """Tensors of a Megatron checkpoint, layers and experts stacked; as a ``SliceReader``."""

    def __init__(self, folder, tensors):
        self.folder, self.tensors = folder, tensors
        self.shapes = {key: (tuple(x.shape), x.dtype) for key, x in tensors.items()}

    def read(self, key, index, out=None):
        return self.tensors[key][tuple(index)].clone()

    def read_layer(self, key, layer, out=None, *, expert=None):
        if key not in self.tensors:
            return self.tensors[layer_key(key, layer)].clone()
        part = self.tensors[key][layer]
        return (part if expert is None else part[expert]).clone()


def random_tensors(arch):
    """Tensors by name, none of which is trivial."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for weight in weights(arch):
        layers = [arch.num_layers] * (weight.per_layer and not arch.is_hybrid)
        size = (*layers, *shape(weight, arch))
        std, mean = (0.3, weight.init == "ones") if "norm" in weight.key else (0.2, 0)
        for name in names_on_disk(weight, arch):
            tensors[name] = torch.randn(size, generator=generator) * std + mean
    return tensors


def megatron_logits(arch, memory, ids, groups):
    """Logits [b, s, rows] of a Megatron model."""
    (model,) = build_model(arch, ModelOptions(), groups)
    scores = Scores(vectors={}, removal_order=(), source=arch, **HOW)
    fill_trimmed(model_state_dict([model]), memory, make_plan(scores, arch, arch))
    positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    with torch.no_grad():
        return model.eval()(ids, positions, None).transpose(0, 1)


HOW = {"aggregation": "", "samples": 0, "seq_length": 0, "depth": ""}


def auto_class(model_type):
    masked = "bert" in model_type
    return transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM


def difference(found, expected):
    """The largest one, beside the largest logit."""
    columns = min(found.size(-1), expected.size(-1))
    gap = found[..., :columns].double() - expected[..., :columns].double()
    return float(gap.abs().max() / expected.abs().max())


def random_ids(rows):
    return torch.randint(rows, (2, 20), generator=torch.Generator().manual_seed(2))


def logits_of(model, rows):
    """Logits [b, s, rows] of transformers."""
    with torch.no_grad():
        return model.eval()(random_ids(rows)).logits


def exported(root, model_type):
    """[(change, the refusal or the folder and the logits)] of a family."""
    family, base = FAMILIES[model_type], arch_of({"model_type": model_type, **CONFIGS[model_type]})
    groups, outcomes = platform.initialize().groups, []
    for number, change in enumerate(CHANGES):
        try:
            arch = replace(base, **change)
        except ValueError:
            continue  # no such model
        folder = f"{root}/{number}"
        memory = Memory(folder, random_tensors(arch))
        exporter.SliceReader = lambda folder, memory=memory: memory
        source = Checkpoint(Path(folder), {"args": Namespace(**arch.to_args(), hf_config=None)})
        try:
            exporter.export_folder(source, folder, model_type=family.model_type)
        except UserError as error:
            outcomes.append((change, str(error)))
            continue
        ids = random_ids(arch.vocab_size)
        outcomes.append((change, (folder, megatron_logits(arch, memory, ids, groups))))
    return outcomes


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_exported_computes_the_same(tmp_path, model_type):
    assert {name for change in CHANGES for name in change} == {f.name for f in fields(Arch)}
    (outcomes,) = run_ranks(1, exported, str(tmp_path), model_type)
    held = set()
    for change, outcome in outcomes:
        if isinstance(outcome, str):
            assert "cannot be exported" in outcome
            continue
        folder, found = outcome
        model = auto_class(model_type).from_pretrained(folder, dtype=torch.float32, **EAGER)
        rows = model.config.vocab_size
        gap = difference(found, logits_of(model, rows))
        assert gap < 1e-4, f"{change}: {gap}"
        held |= change.keys()
    # Gemma multiplies its embedding by sqrt(hidden_size): another size is another model.
    fixed = {"hidden_size"} if FAMILIES[model_type].gemma else set()
    assert FAMILIES[model_type].sizes.keys() - fixed <= held


def changed_configs(model_type):
    """Each key of the family's class at another value, and ``KEYS``."""
    defaults = transformers.AutoConfig.for_model(model_type, **CONFIGS[model_type]).to_dict()
    for key, value in defaults.items():
        if isinstance(value, bool):
            yield {key: not value}
        elif isinstance(value, int) and not key.endswith("token_id"):
            yield {key: value * 2}
            yield {key: value + 1}
        elif isinstance(value, float):
            yield {key: value * 1.5 + 0.1}
    yield from KEYS


def imported(folders):
    """The refusal or the logits of each folder."""
    groups, outcomes = platform.initialize().groups, []
    for folder in folders:
        try:
            outcomes.append(imported_logits(folder, groups))
        except (UserError, ValueError) as error:
            outcomes.append(str(error))
    return outcomes


def random_model(model_type, values):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **values)
    model = auto_class(model_type).from_config(config, **EAGER)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model


def imported_logits(folder, groups):
    source = HfFolder(folder)
    arch, family = arch_of(source.config), FAMILIES[source.config["model_type"]]
    work = list(pieces(arch, family))
    check_tensors(source, arch, family, work)
    share, readers = planned_share(source, arch, family, work, 0, 1)
    shards = [shard for shard in share.values() if (shard.key, shard.global_offset) in readers]
    tensors = {shard.key: torch.empty(shard.global_shape) for shard in shards}
    for shard in shards:
        place = shard.global_offset[: shard.prepend_axis_num]
        tensors[shard.key][place] = readers[shard.key, shard.global_offset]()
    return megatron_logits(arch, Memory(folder, tensors), random_ids(ROWS), groups)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_imported_computes_the_same(tmp_path, model_type):
    """Values that transformers takes: what it makes of a key is the reference."""
    changes, folders, expected = [], [], []
    for number, change in enumerate(changed_configs(model_type)):
        written = CONFIGS[model_type] | change
        try:
            model = random_model(model_type, written)
            logits = logits_of(model, ROWS)
        except Exception:  # of every kind: transformers has no such model
            continue
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, **written}))
        changes.append(change)
        folders.append(str(folder))
        expected.append(logits)
    (outcomes,) = run_ranks(1, imported, folders)
    gaps = [
        (change, difference(found, logits))
        for change, found, logits in zip(changes, outcomes, expected, strict=True)
        if not isinstance(found, str)
    ]
    assert not [(change, gap) for change, gap in gaps if not gap < 1e-4]
    assert len(gaps) > 20
