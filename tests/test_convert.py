"""Hugging Face models in and out: logits, tensors, pruned models, what is refused."""

import json
import os
import resource
import shutil
import signal
import weakref
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors.torch import load_file, save_file

from megatron_ext.arch import num_parameters
from megatron_ext.arch.per_layer import switches
from megatron_ext.checkpoint import checkpoints, writer
from megatron_ext.convert import exporter
from megatron_ext.convert.config import arch_of, config_of
from megatron_ext.convert.exporter import export_folder
from megatron_ext.convert.families import FAMILIES
from megatron_ext.convert.hf_folder import header_of, write_weights
from megatron_ext.convert.importer import import_folder
from megatron_ext.inference.generation import continue_tokens, load_model
from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.open import restore_weights
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import CHECKPOINT, DIFFERS, RUNTIME, USAGE, UserError
from tests.models import LLAMA
from tests.programs import (
    assert_same_bytes,
    data_flags,
    fail,
    read_tensors,
    run_program,
    succeed,
    write_corpus,
    write_model,
)
from tests.ranks import run_ranks

ROWS = 101
COMMON = {
    "vocab_size": ROWS,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
}
MINISTRAL = {
    **YARN,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
GRANITE = {
    "tie_word_embeddings": True,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.15,
    "logits_scaling": 8.0,
}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
MAMBA_LAYERS = ["linear_attention", "mlp", "full_attention", "linear_attention"]
BERT = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
# name: model_type and config; every family at least once.
MODELS = {
    "llama": ("llama", {**COMMON, "tie_word_embeddings": False}),
    "llama 3.2": (
        "llama",
        {**COMMON, "rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 12},
    ),
    "llama with biases": ("llama", {**COMMON, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**COMMON, "head_dim": 20, "sliding_window": None}),
    "mistral 0.1": ("mistral", {**COMMON, "sliding_window": 64}),
    "mistral 0.1 cut": ("mistral", {**COMMON, "sliding_window": 9}),
    "ministral 3": (
        "ministral3",
        {
            **COMMON,
            "pad_token_id": 0,
            "head_dim": 12,
            "sliding_window": 9,
            "rope_parameters": MINISTRAL,
        },
    ),
    "smollm3": (
        "smollm3",
        {
            **COMMON,
            "pad_token_id": 0,
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 9,
        },
    ),
    "glm": ("glm", {**COMMON, "pad_token_id": 0, "head_dim": 16}),
    "glm4": ("glm4", {**COMMON, "pad_token_id": 0, "head_dim": 16}),
    "gemma 3": (
        "gemma3_text",
        {
            **COMMON,
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL},
        },
    ),
    "granite": ("granite", {**COMMON, **GRANITE}),
    "qwen2": ("qwen2", {**COMMON, "tie_word_embeddings": True}),
    "qwen2.5 long": ("qwen2", {**COMMON, "rope_parameters": YARN}),
    "qwen2.5 7B": ("qwen2", {**COMMON, "tie_word_embeddings": False, "max_window_layers": 4}),
    "qwen3": ("qwen3", {**COMMON, "head_dim": 14}),
    "nemotron": ("nemotron", {**COMMON, "head_dim": 16}),
    "phi3": ("phi3", {**COMMON, "pad_token_id": 0, "head_dim": 12, "partial_rotary_factor": 0.5}),
    "nemotron_h": (
        "nemotron_h",
        {
            **{name: value for name, value in COMMON.items() if name != "num_hidden_layers"},
            "layers_block_type": MAMBA_LAYERS,
            "head_dim": 12,
            "mamba_num_heads": 12,
            "mamba_head_dim": 6,
            "n_groups": 4,
            "ssm_state_size": 10,
            "chunk_size": 8,
            "time_step_min": 1e-9,  # which transformers raises steps to
        },
    ),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": ROWS,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 64,
            "initializer_range": 0.1,
        },
    ),
    "bert": ("bert", BERT),
    "megatron-bert": ("megatron-bert", BERT),
    "mixtral": ("mixtral", {**COMMON, **EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **COMMON,
            **EXPERTS,
            "head_dim": 14,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
}
RANDOM = ["--importance", "random", "--seq-length", "16", "--micro-batch-size", "1"]
LAYERS = "--target-num-layers 3"
WIDTH = "--target-hidden-size 40"
DENSE = "--target-ffn-hidden-size 56"
GROUPS = "--target-num-attention-heads 2 --target-num-query-groups 2"
EXPERT_SIZES = "--target-num-experts 3 --target-moe-ffn-hidden-size 20"
TARGETS = {
    "llama": f"{LAYERS} {WIDTH} {DENSE} {GROUPS}",
    "llama 3.2": f"{LAYERS} {WIDTH} {DENSE} --target-num-query-groups 2",
    "llama with biases": f"{WIDTH} {DENSE} {GROUPS}",
    "mistral": f"{LAYERS} --target-hidden-size 34 {DENSE} {GROUPS}",
    "mistral 0.1": f"{LAYERS} {WIDTH} {DENSE} {GROUPS}",
    **dict.fromkeys(
        ("mistral 0.1 cut", "ministral 3", "smollm3", "granite", "glm", "glm4"),
        f"{LAYERS} {WIDTH} {DENSE} {GROUPS}",
    ),
    # Its embedding is multiplied by sqrt(hidden_size), always.
    "gemma 3": f"{LAYERS} {DENSE} {GROUPS}",
    "qwen2": f"{LAYERS} {WIDTH} {DENSE} {GROUPS}",
    "qwen2.5 long": f"{LAYERS} {WIDTH} {DENSE} {GROUPS}",
    "qwen2.5 7B": f"{LAYERS} {WIDTH} {DENSE} --target-num-attention-heads 4",
    "qwen3": f"{LAYERS} {WIDTH} {DENSE} {GROUPS}",
    "nemotron": f"{LAYERS} {WIDTH} {DENSE} {GROUPS}",
    "phi3": f"{LAYERS} {WIDTH} {DENSE} {GROUPS}",
    "nemotron_h": f"{WIDTH} {DENSE} {GROUPS} --target-mamba-num-heads 8 --target-mamba-head-dim 4 "
    "--target-mamba-layers 1",
    # The head_dim of these is hidden_size / heads, always.
    "gpt2": f"{LAYERS} --target-hidden-size 24 --target-num-attention-heads 3 {DENSE}",
    "bert": f"{LAYERS} --target-hidden-size 36 --target-num-attention-heads 6 {DENSE}",
    "megatron-bert": f"{LAYERS} --target-hidden-size 36 --target-num-attention-heads 6 {DENSE}",
    "mixtral": f"{LAYERS} {WIDTH} {GROUPS} {EXPERT_SIZES}",
    "qwen3_moe": f"{LAYERS} {WIDTH} {GROUPS} {EXPERT_SIZES}",
}


def tokens():
    return torch.randint(ROWS, (2, 24), generator=torch.Generator().manual_seed(2))


def hf_logits(folder):
    """Logits [b, s, v] of transformers, float32."""
    model, report = auto_class(transformers.AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        return model.eval()(tokens()).logits


def auto_class(config):
    """The class of language models, causal or masked."""
    masked = "bert" in config.model_type
    return transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM


def write_hf(folder, name, dtype=torch.float32, **save):
    """Save a random model, no weight of which is trivial."""
    model_type, values = MODELS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **values)
    model = auto_class(config).from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder, **save)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folder of all models: NAME/hf, imported to NAME/megatron."""
    root = tmp_path_factory.mktemp("convert")
    for name in MODELS:
        write_hf(root / name / "hf", name)
    run_ranks(1, import_all, str(root), timeout=300)
    return root


def import_all(root):
    platform.initialize()
    for name in MODELS:
        folder = Path(root) / name
        import_folder(folder / "hf", str(folder / "megatron"), make_vocab_size_divisible_by=8)


def export_all(root, kind, result):
    platform.initialize()
    for name in MODELS:
        folder = Path(root) / name
        export_folder(checkpoints.read(str(folder / kind)), str(folder / result))


def megatron_logits(folders, tp, pp):
    """Logits [b, s, padded v] of checkpoints, on the last stage's ranks; None on others."""
    groups = platform.initialize(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
    ).groups
    found = []
    for folder in folders:
        source = checkpoints.read(folder)
        (model,) = build_model(source.arch, ModelOptions(), groups)
        restore_weights([model], source)
        ids = tokens()
        hidden = torch.empty(ids.shape[1], len(ids), source.arch.hidden_size)
        if groups.pp.rank():
            torch.distributed.recv(hidden, groups.pp.rank() - 1)
            model.set_input_tensor(hidden)
        with torch.no_grad():
            output = model.eval()(ids, torch.arange(ids.shape[1]).repeat(len(ids), 1), None)
        if groups.pp.rank() < pp - 1:
            torch.distributed.send(output.contiguous(), groups.pp.rank() + 1)
            found.append(None)
            continue
        parts = [torch.empty_like(output) for _ in range(tp)]
        torch.distributed.all_gather(parts, output.contiguous(), group=groups.tp)
        found.append(torch.cat(parts, -1).transpose(0, 1))
    return found


def assert_close(name, found, expected):
    difference = (found[..., : expected.size(-1)] - expected).abs().max() / expected.abs().max()
    assert difference < 1e-4, f"{name}: {difference}"


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_logits_are_those_of_transformers(folders, tp, pp):
    paths = [str(folders / name / "megatron") for name in MODELS]
    logits = run_ranks(tp * pp, megatron_logits, paths, tp, pp)[-1]
    for name, found in zip(MODELS, logits, strict=True):
        assert_close(name, found, hf_logits(folders / name / "hf"))


def loss_of(folder):
    groups = platform.initialize().groups
    source = checkpoints.read(folder)
    (model,) = build_model(source.arch, ModelOptions(), groups)
    restore_weights([model], source)
    ids = tokens()
    positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    with torch.no_grad():
        return model.eval()(ids, positions, None, labels=ids.flip(1))


def test_padding_of_the_vocabulary_does_not_count_in_the_loss(folders, tmp_path):
    """Logits of an imported model may all be far below 0, which those of padding are."""
    folder = tmp_path / "hf"
    shutil.copytree(folders / "llama/hf", folder)

    def shift(found):  # by 1000 in all columns: a softmax does not change
        found["model.norm.weight"][0] = 1.0
        found["model.embed_tokens.weight"][:, 0] = 40.0
        found["lm_head.weight"][:, 0] = -300.0

    tensors(folder, shift)
    run_ranks(1, import_one, str(folder), str(tmp_path / "megatron"))
    expected = hf_logits(folder)
    assert expected.max() < -500
    losses = torch.nn.functional.cross_entropy(
        expected.transpose(1, 2), tokens().flip(1), reduction="none"
    )
    (found,) = run_ranks(1, loss_of, str(tmp_path / "megatron"))
    assert torch.allclose(found, losses, rtol=1e-3)


def import_one(folder, save):
    platform.initialize()
    import_folder(folder, save)


def import_beside_a_gpu(folder, save):
    torch.cuda.is_available = lambda: True
    platform.initialize(device="cpu")
    import_folder(folder, save)


def test_import_on_a_machine_with_a_gpu(folders, tmp_path):
    """torch's writer of checkpoints chose a CUDA stream there, and had none to wait for."""
    run_ranks(1, import_beside_a_gpu, str(folders / "llama" / "hf"), str(tmp_path / "megatron"))


def test_export_returns_what_was_imported(folders):
    run_ranks(1, export_all, str(folders), "megatron", "hf-again")
    for name in MODELS:
        before, after = (
            load_file(folders / name / kind / "model.safetensors") for kind in ("hf", "hf-again")
        )
        assert before.keys() == after.keys(), name
        for key, tensor in before.items():
            assert torch.equal(tensor, after[key]), f"{name} {key}"
        old, new = (
            json.loads((folders / name / kind / "config.json").read_text())
            for kind in ("hf", "hf-again")
        )
        changed = {key for key, value in old.items() if value not in (None, new.get(key))}
        assert not changed, f"{name}: {changed}"
        assert torch.equal(hf_logits(folders / name / "hf"), hf_logits(folders / name / "hf-again"))


@pytest.fixture(scope="module")
def pruned(folders):
    """Return the folder of all models, pruned on every axis and exported: NAME/hf-pruned."""
    for name, targets in TARGETS.items():
        where = ["--load", str(folders / name / "megatron")]
        where += ["--save", str(folders / name / "pruned")]
        succeed("prune", [*where, *RANDOM, *targets.split()])
    run_ranks(1, export_all, str(folders), "pruned", "hf-pruned")
    return folders


def test_pruned_models_leave_as_they_are(pruned):
    paths = [str(pruned / name / "pruned") for name in MODELS]
    (logits,) = run_ranks(1, megatron_logits, paths, 1, 1)
    for name, found in zip(MODELS, logits, strict=True):
        assert_close(name, found, hf_logits(pruned / name / "hf-pruned"))
        small, large = (
            (pruned / name / kind / "model.safetensors").stat().st_size
            for kind in ("hf-pruned", "hf")
        )
        assert small < large, name


def test_config_of_a_pruned_model_says_its_own_sizes(pruned):
    """In the keys of every version of transformers."""
    for name in MODELS:
        arch = checkpoints.read(str(pruned / name / "pruned")).arch
        config = json.loads((pruned / name / "hf-pruned/config.json").read_text())
        family = FAMILIES[config["model_type"]]
        for field, keys in family.sizes.items():
            if field == "ffn_hidden_size" and arch.num_experts:
                continue  # of a plain MLP, which this model has not
            found = [config[key] for key in keys]
            assert found == [getattr(arch, field)] * len(keys), f"{name} {field}"
        assert config["dtype"] == config["torch_dtype"] == "float32"
        if "layer_types" in config and not arch.is_hybrid:
            cut = switches(arch, "window_attn_skip_freq") or [arch.window is not None] * 3
            kinds = ("full_attention", "sliding_attention")
            assert config["layer_types"] == [kinds[on] for on in cut]
        assert name != "qwen2.5 7B" or config["max_window_layers"] == arch.num_layers == 3
        if arch.position_embedding_type == "rope":
            rope = config["rope_parameters"]
            assert config["rope_theta"] == rope.get("full_attention", rope)["rope_theta"]
            assert config["head_dim"] == arch.kv_channels
    scaling = json.loads((pruned / "llama 3.2/hf-pruned/config.json").read_text())["rope_scaling"]
    assert scaling == {name: value for name, value in LLAMA3.items() if name != "rope_theta"}


def greedy_texts(folders, prompt, count):
    """Continue ``prompt`` with each checkpoint as tools/generate.py does."""
    place = platform.initialize()
    models = [load_model(checkpoints.read(folder), place) for folder in folders]
    return [
        continue_tokens(
            lambda ids, logits=logits: logits(ids)[-1],
            prompt,
            max_new_tokens=count,
            eod=-1,
            vocab_size=ROWS,
        )
        for logits in models
    ]


def test_greedy_text_is_the_same(pruned):
    """Pruned models of every family; below, one that was not pruned."""
    paths = [str(pruned / name / "pruned") for name in MODELS]
    (texts,) = run_ranks(1, greedy_texts, paths, [5, 17, 60], 5)
    for name, text in zip(MODELS, texts, strict=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            pruned / name / "hf-pruned", dtype=torch.float32, attn_implementation="eager"
        )
        ids = torch.tensor([[5, 17, 60]])
        with torch.no_grad():
            for _ in range(5):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert ids[0, 3:].tolist() == text, name


def test_greedy_text_of_the_program(folders):
    folder, ids = folders / "qwen3", [5, 17, 60]
    (expected,) = run_ranks(1, greedy_texts, [str(folder / "megatron")], ids, 12)
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(ROWS)]
    flags = ["--load", str(folder / "megatron"), *null, "--max-new-tokens", "12"]
    (outcome,) = succeed("tools.generate", [*flags, "--prompt", "5 17 60"])
    text = outcome.stdout.split("--- continuation")[1].split("\n", 1)[1]
    assert [int(word) for word in text.split()] == expected[0]


def test_ranks_share_the_work_and_files_are_cut(tmp_path):
    hf = write_hf(tmp_path / "hf", "qwen2", torch.bfloat16, max_shard_size="40KB")
    assert (tmp_path / "hf/model.safetensors.index.json").exists()
    for ranks in (1, 2):
        save, out = str(tmp_path / f"megatron{ranks}"), tmp_path / f"out{ranks}"
        succeed("tools.convert", ["import", "--hf", hf, "--save", save], ranks)
        size = ["--max-shard-size", "50KB"]
        succeed("tools.convert", ["export", "--load", save, "--hf", str(out), *size], ranks)
    one, two = tmp_path / "out1", tmp_path / "out2"
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert len([n for n in names if n.endswith(".safetensors")]) > 3
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert torch.equal(hf_logits(tmp_path / "hf"), hf_logits(one))
    index = json.loads((one / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        x.numel() * 2 for p in one.glob("*.safetensors") for x in load_file(p).values()
    )
    large = [p for p in one.glob("*.safetensors") if p.stat().st_size > 52_000]
    assert all(len(load_file(p)) == 1 for p in large)


def widen_norms(source, folder):
    """Copy a checkpoint whose norms are float32."""
    found, state = checkpoints.read(source), {}
    platform.initialize()
    for key, tensor in read_tensors(source).items():
        whole = tensor.float() if "norm" in key else tensor
        state[key] = ShardedTensor.from_rank_offsets(key, whole)
    args = Namespace(**found.args)
    writer.save(folder, "release", {"model": state, "args": args}, files={})


def test_a_checkpoint_of_two_dtypes(tmp_path):
    """Regression: the index counted every tensor with the bytes of the embedding's dtype."""
    hf = write_hf(tmp_path / "hf", "qwen2", torch.bfloat16)
    narrow, wide, out = (str(tmp_path / name) for name in ("narrow", "wide", "out"))
    succeed("tools.convert", ["import", "--hf", hf, "--save", narrow])
    run_ranks(1, widen_norms, narrow, wide)
    flags = ["export", "--load", wide, "--hf", out, "--max-shard-size", "50KB"]
    succeed("tools.convert", flags, 2)
    before, found = load_file(f"{hf}/model.safetensors"), {}
    for path in Path(out).glob("*.safetensors"):
        found |= load_file(path)
        tensors = sum(x.numel() * x.itemsize for x in load_file(path).values())
        assert tensors <= 50_000 or len(load_file(path)) == 1
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
        assert torch.equal(tensor.bfloat16(), before[name]), name
    index = json.loads(Path(out, "model.safetensors.index.json").read_text())
    total = sum(x.numel() * x.itemsize for x in found.values())
    assert index["metadata"]["total_size"] == total


def test_weights_are_written_one_by_one(tmp_path):
    """Regression: an export held two copies of a file. The tensor written may still be there."""
    written, alive = tmp_path / "weights", []

    def tensors():
        for value in range(3):
            tensor = torch.full((1000, 100), float(value))
            alive.append(weakref.ref(tensor))
            yield tensor
            del tensor
            assert sum(ref() is not None for ref in alive) <= 1

    header = header_of((str(value), (1000, 100), torch.float32) for value in range(3))
    write_weights(written, header, tensors())
    assert {k: x.unique().item() for k, x in load_file(written).items()} == {"0": 0, "1": 1, "2": 2}


def test_tokenizer_and_origin_travel_through_pruning_and_training(tmp_path):
    """Rows beyond the tokenizer's tokens are kept as padding, and come back."""
    hf = write_hf(tmp_path / "hf", "qwen2")
    words = {f"w{i}": i for i in range(90)} | {"<unk>": 90, "<eos>": 91}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "eos_token": "<eos>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(hf)
    teacher, pruned, student = (str(tmp_path / n) for n in ("teacher", "pruned", "student"))
    succeed("tools.convert", ["import", "--hf", hf, "--save", teacher])
    arch = checkpoints.read(teacher).arch
    count = len(transformers.AutoTokenizer.from_pretrained(hf))  # Qwen's adds one of its own
    assert (arch.vocab_size, arch.padded_vocab_size) == (count, 128)
    assert count < ROWS
    saved = checkpoints.read(teacher).args
    assert saved["tokenizer_type"] == "HuggingFaceTokenizer"
    beside = transformers.AutoTokenizer.from_pretrained(saved["tokenizer_model"])
    assert beside.get_vocab().items() >= words.items()
    cut = [*RANDOM, "--target-ffn-hidden-size", "56"]
    succeed("prune", ["--load", teacher, "--save", pruned, *cut])
    corpus = write_corpus(tmp_path / "corpus", 92)
    data = data_flags(arch, corpus)
    at = data.index("--tokenizer-type")
    data[at + 1] = "HuggingFaceTokenizer"
    data += ["--tokenizer-model", hf]
    train = [
        "--save-interval",
        "2",
        "--train-iters",
        "2",
        "--lr",
        "1e-3",
        "--global-batch-size",
        "2",
        "--eval-iters",
        "0",
    ]
    where = ["--load", pruned, "--teacher-load", teacher, "--save", student]
    succeed("pretrain_distill", [*where, *train, *without(data, "--vocab-size")])
    assert checkpoints.read(student).iteration == 2
    out = tmp_path / "out"
    succeed("tools.convert", ["export", "--load", student, "--hf", str(out)])
    assert load_file(out / "model.safetensors")["model.embed_tokens.weight"].shape[0] == ROWS
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "hf/tokenizer.json").read_bytes()
    assert hf_logits(out).shape[-1] == ROWS


def without(argv, flag):
    at = argv.index(flag)
    return argv[:at] + argv[at + 2 :]


def test_files_of_published_berts(folders, tmp_path):
    """Norms with TensorFlow's names, a next-sentence head, tied weights written twice."""
    folder, save = tmp_path / "hf", str(tmp_path / "megatron")
    shutil.copytree(folders / "bert/hf", folder)

    def age(found):
        for name in [name for name in found if "LayerNorm" in name]:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            found[old.replace("LayerNorm.bias", "LayerNorm.beta")] = found.pop(name)
        found["bert.pooler.dense.weight"] = torch.ones(48, 48)
        found["cls.seq_relationship.bias"] = torch.ones(2)
        found["cls.predictions.decoder.bias"] = found["cls.predictions.bias"].clone()
        found["bert.embeddings.position_ids"] = torch.arange(64).unsqueeze(0)

    tensors(folder, age)
    flags = ["import", "--hf", str(folder), "--save", save, "--make-vocab-size-divisible-by", "8"]
    (outcome,) = succeed("tools.convert", flags)
    left = "bert.pooler.dense.weight, cls.seq_relationship.bias: of other heads, left out"
    assert left in outcome.stderr
    assert_same_bytes(read_tensors(save), read_tensors(str(folders / "bert/megatron")))


VISION = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


def write_with_pictures(folder):
    """Save a random model of pictures and text and return the logits of its text."""
    model_type, values = MODELS["ministral 3"]
    torch.manual_seed(0)
    parts = {"text_config": {"model_type": model_type, **values}, "vision_config": VISION}
    config = transformers.AutoConfig.for_model("mistral3", **parts)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


@pytest.mark.parametrize("new_names", [False, True])
def test_the_text_of_a_model_of_pictures(new_names, tmp_path):
    """Mistral Small 3.1 and Ministral 3 are published as such; names differ between versions."""
    expected = write_with_pictures(tmp_path / "hf")
    if new_names:
        tensors(tmp_path / "hf", rename_text)
    flags = ["import", "--hf", str(tmp_path / "hf"), "--save", str(tmp_path / "megatron")]
    (outcome,) = succeed("tools.convert", flags)
    assert "tensors beside the language model, left out" in outcome.stderr
    (logits,) = run_ranks(1, megatron_logits, [str(tmp_path / "megatron")], 1, 1)
    assert_close("text", logits[0], expected)
    hf = str(tmp_path / "out")
    succeed("tools.convert", ["export", "--load", str(tmp_path / "megatron"), "--hf", hf])
    assert_close("export", hf_logits(hf), expected)


def rename_text(found):
    for name in list(found):
        new = name.replace("language_model.model.", "model.language_model.")
        found[new.replace("language_model.lm_head.", "lm_head.")] = found.pop(name)


def test_a_model_of_no_known_origin_needs_its_family(tmp_path):
    write_model(str(tmp_path / "model"), LLAMA)
    flags = ["export", "--load", str(tmp_path / "model"), "--hf", str(tmp_path / "hf")]
    _, line = fail("tools.convert", flags)
    assert "--model-type" in line
    succeed("tools.convert", [*flags, "--model-type", "mistral"])
    code, line = fail("tools.convert", [*flags, "--model-type", "mistral"])
    assert (code, "is there already" in line) == (USAGE, True)
    shutil.rmtree(tmp_path / "hf")
    code, line = fail("tools.convert", [*flags, "--model-type", "gpt2"])
    assert code == CHECKPOINT
    assert "cannot be exported as gpt2" in line
    assert not list(tmp_path.glob("*hf*"))


def die_at_the_end():
    exporter._finish = lambda *args: os._exit(9)


def test_a_kill_while_exporting_leaves_nothing_that_looks_complete(folders, tmp_path):
    flags = ["export", "--load", str(folders / "qwen2/megatron"), "--hf", str(tmp_path / "hf")]
    with pytest.raises(AssertionError, match="died"):
        run_program("tools.convert", flags, before=die_at_the_end)
    assert not (tmp_path / "hf").exists()
    assert not list(tmp_path.glob("**/config.json"))
    succeed("tools.convert", flags)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def fill_the_disk():
    """Limit files to 10 kB: the write that goes beyond fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))


def test_what_cannot_be_exported_is_said_in_a_line_and_leaves_nothing(folders, tmp_path):
    flags = ["export", "--load", str(folders / "qwen2/megatron"), "--hf", str(tmp_path / "hf")]
    code, line = fail("tools.convert", flags, 2, before=fill_the_disk)
    assert (code, "File too large" in line) == (RUNTIME, True)
    code, line = fail("tools.convert", [*flags, "--tokenizer-model", str(tmp_path)], 2)
    assert (code, "no tokenizer files there" in line) == (USAGE, True)
    assert list(tmp_path.iterdir()) == []


BAD = {
    "model_type 'bert2'": lambda f: edit(f, model_type="bert2"),
    "there is no num_hidden_layers": lambda f: edit(f, num_hidden_layers=None),
    "hidden_act 'tanh'": lambda f: edit(f, hidden_act="tanh"),
    "rope_type yarn has no factor": lambda f: edit(f, rope_parameters={"rope_type": "yarn"}),
    "rope_type yarn has no original": lambda f: edit(
        f, rope_parameters={"rope_type": "yarn", "factor": 2.0}
    ),
    "rope_type 'longrope'": lambda f: edit(f, rope_parameters={"rope_type": "longrope"}),
    "rope factor 2.5": lambda f: edit(f, rope_parameters={"rope_type": "linear", "factor": 2.5}),
    "rope low_freq_factor 2.0": lambda f: edit(
        f, rope_parameters={**LLAMA3, "low_freq_factor": 2.0}
    ),
    "rope_type llama3 has no factor": lambda f: edit(f, rope_parameters={"rope_type": "llama3"}),
    "rope_theta None is no number": lambda f: edit(f, rope_parameters=None, rope_theta=None),
    'hidden_size "48" is no number': lambda f: edit(f, hidden_size="48"),
    "--num-attention-heads 8 is not a multiple": lambda f: edit(f, num_key_value_heads=3),
    "though tie_word_embeddings is true": lambda f: edit(f, tie_word_embeddings=True),
    "quantization_config": lambda f: edit(f, quantization_config={"bits": 4}),
    "layer_types has full_attention": lambda f: edit(
        f, sliding_window=8, layer_types=["full_attention"] * 4
    ),
    "layer_types has chunked_attention": lambda f: edit(f, layer_types=["chunked_attention"] * 4),
    "is [2, 48], config.json says [101, 48]": lambda f: tensors(f, lambda x: shrink(x)),
    "there is no tensor model.layers.4": lambda f: edit(f, num_hidden_layers=6),
    "extra.weight has no row": lambda f: tensors(f, lambda x: x.update(extra_weight(x))),
    "others of its kind float32": lambda f: tensors(f, lambda x: halve(x)),
    "config.json is missing": lambda f: (f / "config.json").unlink(),
    "config.json cannot be read": lambda f: (f / "config.json").write_text("{"),
    "is a pickle": lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
    "model.safetensors cannot be read": lambda f: cut_short(f / "model.safetensors"),
    "index.json has no weight_map": lambda f: only_index(f, {"weight_map": ["model.safetensors"]}),
    "neither model.safetensors nor": lambda f: (f / "model.safetensors").unlink(),
    "model-00002-of-00002.safetensors is missing": lambda f: split_off(f),
}


def edit(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps(config))


def tensors(folder, change):
    path = folder / "model.safetensors"
    found = load_file(path)
    change(found)
    save_file(found, path)


def shrink(found):
    found["model.embed_tokens.weight"] = found["model.embed_tokens.weight"][:2].clone()


def extra_weight(found):
    return {"model.layers.0.extra.weight": torch.ones(2)}


def halve(found):
    name = "model.layers.1.mlp.down_proj.weight"
    found[name] = found[name].half()


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def only_index(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def split_off(folder):
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    weight_map[names[0]] = "model-00002-of-00002.safetensors"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def import_bad(root):
    """Return code and line of each error, and whether something was left."""
    platform.initialize()
    found = []
    for number in range(len(BAD)):
        save = f"{root}/out{number}"
        try:
            import_folder(f"{root}/{number}", save)
        except UserError as error:
            found.append((error.code, str(error), Path(save).exists()))
        else:
            found.append((0, "nothing was refused", True))
    return found


def test_what_cannot_be_imported_is_refused_in_a_line(folders, tmp_path):
    for number, spoil in enumerate(BAD.values()):
        folder = tmp_path / str(number)
        shutil.copytree(folders / "mistral/hf", folder)
        spoil(folder)
    for rank in run_ranks(2, import_bad, str(tmp_path)):
        for expected, (code, line, is_left) in zip(BAD, rank, strict=True):
            assert expected in line
            assert code == CHECKPOINT, line
            assert "\n" not in line
            assert not is_left, expected


def test_llama_needs_whole_heads(folders):
    arch = replace(checkpoints.read(str(folders / "llama/megatron")).arch, hidden_size=42)
    with pytest.raises(ValueError, match="no multiple of 8 heads"):
        config_of(arch, FAMILIES["llama"], {}, "bfloat16")
    config = config_of(arch, FAMILIES["mistral"], {}, "bfloat16")
    assert config["hidden_size"] == 42
    assert config["head_dim"] == arch.kv_channels


def test_sizes_of_known_models():
    """Figures of the models' own config.json."""
    llama = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA3, "factor": 8.0},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    arch = arch_of(llama)
    assert num_parameters(arch) == 8_030_261_248
    assert (arch.rope_scaling_factor, arch.use_rope_scaling, arch.rotary_base) == (
        8.0,
        True,
        500000,
    )
    gpt2 = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}
    assert num_parameters(arch_of({**gpt2, "n_positions": 1024})) == 124_439_808


WIDE = {"tie_word_embeddings": False, "hidden_act": "silu"}
PHI_3_MINI = {
    **WIDE,
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "sliding_window": 2047,
    "rope_theta": 10000.0,
}
PHI_4 = {
    **PHI_3_MINI,
    "vocab_size": 100352,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "max_position_embeddings": 16384,
    "sliding_window": None,
    "rope_theta": 250000.0,
}
SMOLLM3_3B = {
    "model_type": "smollm3",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 65536,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "rope_theta": 5000000.0,
}
GRANITE_2B = {
    "model_type": "granite",
    "vocab_size": 49155,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
    "logits_scaling": 8.0,
}
GLM_4_9B = {
    **WIDE,
    "model_type": "glm",
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "attention_bias": True,
    "rope_theta": 10000.0,
}
GEMMA_3_270M = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
}
GEMMA_3_1B = {
    **GEMMA_3_270M,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
}
MISTRAL_7B = {
    **WIDE,
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
QWEN_7B = {
    **WIDE,
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
}


@pytest.mark.parametrize(
    ("config", "count", "sizes"),
    [
        (PHI_3_MINI, 3_821_079_552, {"window_size": "2046,0", "window_attn_skip_freq": None}),
        (PHI_4, 14_659_507_200, {"window_size": None, "num_query_groups": 10}),
        (SMOLLM3_3B, 3_075_098_624, {"no_rope_freq": f"[{','.join('0001' * 9)}]"}),
        (GRANITE_2B, 2_533_531_648, {"softmax_scale": 1 / 64, "residual_multiplier": 0.22}),
        (GLM_4_9B, 9_399_951_360, {"rotary_percent": 0.5, "rotary_interleaved": True}),
        (GEMMA_3_270M, 268_098_176, {"rotary_base_local": 10_000, "softmax_scale": 1 / 16}),
        (GEMMA_3_1B, 999_885_952, {"window_size": "511,0", "embedding_multiplier": 1152**0.5}),
        (MISTRAL_7B, 7_241_732_096, {"window_size": "4095,0", "kv_channels": 128}),
        (QWEN_7B, 7_615_616_512, {"rotary_scaling_factor": 4.0, "window_size": None}),
    ],
    ids=[
        "Phi-3-mini",
        "phi-4",
        "SmolLM3-3B",
        "granite-3.0-2b",
        "glm-4-9b",
        "gemma-3-270m",
        "gemma-3-1b",
        "Mistral-7B",
        "Qwen2.5-7B",
    ],
)
def test_parameter_counts_of_published_models(config, count, sizes):
    arch = arch_of(config)
    assert num_parameters(arch) == count
    assert {name: getattr(arch, name) for name in sizes} == sizes


def test_queries_that_ministral_scales_by_their_position_are_refused():
    config = {"model_type": "ministral3", **COMMON, "rope_parameters": MINISTRAL}
    assert arch_of(config).position_embedding_type == "yarn"
    with pytest.raises(ValueError, match="--max-position-embeddings 64 imports the model"):
        arch_of({**config, "max_position_embeddings": 65})


def test_check_compares_logits_with_transformers(folders, tmp_path):
    """0 and small differences of the same model, 5 of another one; causal and masked."""
    text = ["--seq-length", "24", "--tolerance", "1e-4"]
    for name in ("qwen2.5 7B", "bert"):
        flags = ["check", "--hf", str(folders / name / "hf"), *text]
        (same,) = succeed("tools.convert", [*flags, "--load", str(folders / name / "megatron")])
        assert "the same at 100.00% of 48 positions" in same.stdout
        assert "OK: within 0.0001" in same.stdout
    other = ["--load", str(folders / "mistral/megatron"), "--tokens", "5", "17", "60"]
    (differs,) = run_program("tools.convert", ["check", "--hf", str(folders / "llama/hf"), *other])
    assert differs.code == DIFFERS
    figures = differs.stdout.split("mean loss")[1].split()
    expected = hf_loss(folders / "llama/hf", [5, 17, 60])
    assert float(figures[0]) == pytest.approx(expected, rel=1e-5)
    assert "DIFFERS: not within 0.001" in differs.stdout
    wrong = ["--hf", str(folders / "llama/hf"), *other[:-1], str(ROWS)]
    code, line = fail("tools.convert", ["check", *wrong])
    assert (code, f"tokens 0 to {ROWS - 1}" in line) == (USAGE, True)


def hf_loss(folder, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
