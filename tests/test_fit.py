"""A target that cannot be exported is refused before it is pruned, and one that fits is named."""

import json
import re
from dataclasses import replace

import pytest
import transformers

from megatron_ext.convert.config import arch_of
from megatron_ext.convert.families import FAMILIES
from megatron_ext.convert.fit import check_target, export_note, holders, problem_of, serving_note
from megatron_ext.pruning.targets import target_arch
from megatron_ext.runtime.errors import USAGE, UserError
from tests.programs import fail, run_here, succeed

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 32,
    "rope_theta": 1e4,
}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 32}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "head_dim": 8,
    "num_key_value_heads": 8,
    "sliding_window": None,
}
MAMBA = {
    "hybrid_override_pattern": "M-*-",
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 4,
    "ssm_state_size": 8,
}
CONFIGS = {
    name: {
        "model_type": name,
        **(GPT2 if name == "gpt2" else COMMON if "bert" in name else COMMON | EXPERTS),
        **(MAMBA if name == "nemotron_h" else {}),
    }
    for name in FAMILIES
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cut", [{"num_attention_heads": 6}, {"hidden_size": 44}])
def test_targets_are_refused_or_fit(name, cut):
    """Refused where no family holds it, noted where another does, or the own family holds it."""
    origin = CONFIGS[name]
    source = arch_of(origin)
    target = target_arch(source, **cut)
    check_target(source, source, origin)
    problem = problem_of(target, FAMILIES[name], origin)
    note = None
    if problem is None:
        check_target(target, source, origin)
        assert export_note(target, source, origin) is None
        return
    assert FAMILIES[name].whole_heads
    if name == "llama":
        assert holders(target)[0] == "mistral"
        check_target(target, source, origin)
        note = export_note(target, source, origin)
        assert "--model-type mistral" in note
    else:
        with pytest.raises(UserError, match="cannot be exported") as refused:
            check_target(target, source, origin)
        note = str(refused.value)
        assert refused.value.code == USAGE
    named = re.findall(r"--target-([a-z-]+) (\d+)", note)
    assert named
    for flag, value in named:
        other = target_arch(source, **cut | {flag.replace("-", "_"): int(value)})
        assert problem_of(other, FAMILIES[name], origin) is None


def test_of_a_model_of_another_origin_nothing_is_known():
    source = arch_of(CONFIGS["bert"])
    check_target(target_arch(source, hidden_size=44), source, {})


def test_a_real_model_that_breaks_the_rule_of_its_family_comes_in(tmp_path):
    """transformers 4 loads it, and 5 refuses it (hidden 1792, 24 heads of 128 channels)."""
    arch = arch_of(CONFIGS["llama"] | {"num_attention_heads": 6, "num_key_value_heads": 2})
    assert (arch.hidden_size, arch.num_attention_heads, arch.kv_channels) == (64, 6, 8)
    with pytest.raises(Exception, match="multiple"):
        transformers.LlamaConfig(hidden_size=64, num_attention_heads=6)
    assert problem_of(arch, FAMILIES["llama"], {}) is not None
    assert holders(arch)[0] == "mistral"
    assert holders(replace(arch, kv_channels=7)) == []


def test_a_serving_engine_that_reads_no_head_dim_is_named():
    """vLLM's Qwen2, as its code reads: hidden_size // heads."""
    for name, config in CONFIGS.items():
        arch = arch_of({**config, "head_dim": 8})
        assert serving_note(arch, FAMILIES[name]) is None
        note = serving_note(replace(arch, hidden_size=48), FAMILIES[name])
        assert (note is not None) == (name == "qwen2")
    assert "takes 48 // 8, not 8" in serving_note(replace(arch, hidden_size=48), FAMILIES["qwen2"])


HEADS = ["--target-num-attention-heads", "6", "--target-hidden-size", "64"]


def test_programs_ask_first(tmp_path):
    """prune.py, its dry run, its search and an existing plan; with the sizes that fit."""
    hf, megatron, save = (str(tmp_path / name) for name in ("hf", "megatron", "out"))
    config = transformers.GPT2Config(**GPT2, n_inner=80)
    transformers.GPT2LMHeadModel(config).save_pretrained(hf)
    succeed("tools.convert", ["import", "--hf", hf, "--save", megatron])
    common = ["--importance", "random", "--seq-length", "8", "--micro-batch-size", "1"]
    random = ["--load", megatron, *common]
    dry = ["--load", "later", *common, "--dry-run", "--load-config", f"{hf}/config.json"]
    expected = "no multiple of 6 heads, which transformers asks of gpt2; the nearest that fit: "
    expected += "--target-hidden-size 48, --target-num-attention-heads 8"
    space = tmp_path / "space.yaml"
    space.write_text("num_attention_heads: [6]\nffn_hidden_size: [40]\n")
    search = ["--target-params", "100000", "--target-tolerance", "0.9", "--search-space"]
    for flags in ([*random, *HEADS], [*dry, *HEADS], [*dry, *search, str(space)]):
        code, _, errors = run_here(["prune.py", *flags, "--save", save])
        assert code == USAGE
        assert expected in errors
    space.write_text("num_attention_heads: [6, 8]\nffn_hidden_size: [40]\n")
    code, out, _ = run_here(["prune.py", *dry, "--save", save, *search, str(space)])
    assert code == 0
    assert "A8-F40" in out
    assert "A6-F40" not in out
    plan = tmp_path / "plan.json"
    fits = ["--target-num-attention-heads", "6", "--target-hidden-size", "48"]
    succeed("prune", [*random, "--plan", str(plan), *fits])
    values = plan.read_text()
    kept = json.loads(values)
    kept["target"]["hidden_size"], kept["hidden"] = 40, kept["hidden"][:40]
    plan.write_text(json.dumps(kept))
    code, line = fail("prune", [*random, "--plan", str(plan), "--save", save])
    assert "cannot be exported" in line
    assert not (tmp_path / "out").exists()
