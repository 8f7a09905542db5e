"""Checkpoints of Megatron-LM, Megatron Bridge and NeMo: every form is read, no code is run."""

import enum
import json
import os
import pickle
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.transformer import enums
from safetensors.torch import load_file

from megatron_ext.arch import LAYER_PREFIXES, UNSUPPORTED, Arch, check_supported
from megatron_ext.checkpoint import checkpoints, safe_load, saved_args, writer
from megatron_ext.checkpoint.foreign_args import FILES, args_of, read_args
from megatron_ext.checkpoint.slices import layer_key
from megatron_ext.cli.programs import megatron_command_line
from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.open import restore_weights
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import CHECKPOINT, USAGE
from tests.models import BERT, GPT2, LLAMA, MOE, random_batch
from tests.programs import (
    assert_same_bytes,
    data_flags,
    fail,
    read_tensors,
    succeed,
    write_corpus,
    write_model,
)
from tests.ranks import run_ranks

STACKED, PER_LAYER = False, True
# name: in front of tensors, whether each layer has its own, whether common.pt is an object instead
FORMS = {
    "core 0.16": ("", STACKED, False),
    "core 0.19": ("", PER_LAYER, True),
    "stacked, as an object": ("", STACKED, True),
    "NeMo": ("module.", STACKED, False),
    "model.": ("model.", PER_LAYER, False),
}
RANDOM = ["--importance", "random", "--seq-length", "16", "--micro-batch-size", "1"]


def rewrite_all(root, args):
    for form in FORMS:
        rewrite(str(root / "own"), root / form, form, args)


def rewrite(source, root, form, args, name="iter_0000005", objects=()):
    """Write the tensors of ``source`` in another form under root/name, iteration 5."""
    prefix, per_layer, is_object = FORMS[form]
    state = {}
    for key, tensor in read_tensors(source).items():
        is_split = per_layer and key.startswith(LAYER_PREFIXES)
        parts = enumerate(tensor) if is_split else [(None, tensor)]
        for layer, part in parts:
            named = prefix + (key if layer is None else layer_key(key, layer))
            state[named] = ShardedTensor.from_rank_offsets(named, part.contiguous())
    empty = prefix + "decoder.layers.self_attention.linear_qkv._extra_state"
    state["extra"] = ShardedObject(empty, None, (1,), (0,))
    for key, content in objects:
        state[key] = ShardedObject(key, content, (1,), (0,))
    common = {"iteration": 5, "checkpoint_version": 3.0}
    if args is not None:
        # A class that the reader's megatron-core does not have.
        scope = enum.Enum("NewerScope", "attn mlp", module=enums.__name__)
        enums.NewerScope = scope
        common["args"] = Namespace(**args, scopes=[scope.attn], backend=enums.AttnBackend.auto)
    folder = root / name
    folder.mkdir(parents=True)
    dist_checkpointing.save(state | common, str(folder), writer._WriteInProcess())
    if not is_object:
        put_into_a_file(folder, common)
    (root / checkpoints.TRACKER).write_text(name.removeprefix("iter_"))


def put_into_a_file(folder, common):
    """Have ``folder`` keep ``common`` as megatron-core up to 0.18 does."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    del metadata.state_dict_metadata[safe_load.COMMON_OBJECT]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save(common, folder / safe_load.COMMON)
    config = json.loads((folder / "metadata.json").read_text())
    config |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(config))


def logits_of(folders, tp=1, pp=1):
    """Logits [s, b, v / tp] of each, on the last stage; None before it."""
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    groups, found = platform.initialize(**layout).groups, []
    for folder in folders:
        source = checkpoints.read(folder)
        options = ModelOptions(sequence_parallel=tp > 1 and source.arch.num_experts is not None)
        (model,) = build_model(source.arch, options, groups)
        restore_weights([model], source)
        batch = random_batch(replace(source.arch, vocab_size=80), num_samples=2, seq_length=12)
        if pp > 1:
            found.append({name: p.clone() for name, p in model.named_parameters()})
            continue
        with torch.no_grad():
            found.append(model.eval()(batch["tokens"], batch["position_ids"], None))
    return found


@pytest.fixture(scope="module", params=[LLAMA, MOE], ids=["llama", "moe"])
def forms(request, tmp_path_factory):
    """Return a folder with one model in every form, and in ours as ``own``."""
    root = tmp_path_factory.mktemp("forms")
    write_model(str(root / "own"), request.param)
    args = request.param.to_args() | {"vocab_size": None, "tokenizer_type": "GPT2BPETokenizer"}
    run_ranks(1, rewrite_all, root, args)
    return root


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_every_form_is_the_same_model(forms, tp, pp):
    folders = [str(forms / name) for name in ("own", *FORMS)]
    for rank in run_ranks(tp * pp, logits_of, folders, tp, pp):
        for form, found in zip(FORMS, rank[1:], strict=True):
            for name in found if pp > 1 else [...]:
                assert torch.equal(found[name], rank[0][name]), f"{form} {name}"


def padded_on_two_ranks(root, padded_vocab_size):
    groups = platform.initialize(tensor_model_parallel_size=2).groups
    found = {}
    for form in ("own", *FORMS):
        source = checkpoints.read(str(root / form))
        arch = replace(source.arch, padded_vocab_size=padded_vocab_size)
        (model,) = build_model(arch, ModelOptions(), groups)
        restore_weights([model], source, repad=True)
        found[form] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return found


def test_a_vocabulary_padded_so_that_a_rank_has_no_row_of_it(tmp_path):
    """BERT's has a bias too."""
    write_model(str(tmp_path / "own"), BERT)
    run_ranks(1, rewrite_all, tmp_path, BERT.to_args())
    rows = 4 * BERT.padded_vocab_size
    whole, ranks = (
        read_tensors(str(tmp_path / "own")),
        run_ranks(2, padded_on_two_ranks, tmp_path, rows),
    )
    for rank, found in enumerate(ranks):
        for form, parameters in found.items():
            for name, parameter in parameters.items():
                assert torch.equal(parameter, found["own"][name]), f"{form} {name}"
        for name in ("embedding.word_embeddings.weight", "output_layer.bias"):
            expected = torch.zeros(rows, *whole[name].shape[1:])
            expected[: len(whole[name])] = whole[name]
            assert torch.equal(found["own"][name], expected.chunk(2)[rank]), name


def test_every_form_is_pruned_and_leaves(forms, tmp_path):
    """The extra states of Megatron-LM aside, pruned forms have the same bytes."""
    is_dense = checkpoints.read(str(forms / "own")).arch.num_experts is None
    targets, pruned = ["--target-hidden-size", "16", "--target-num-layers", "3"], {}
    for name in ("own", *FORMS) if is_dense else ("own", "core 0.19"):
        where = ["--load", str(forms / name), "--save", str(tmp_path / name)]
        succeed("prune", [*where, *RANDOM, *targets])
        pruned[name] = read_tensors(str(tmp_path / name))
        assert_same_bytes(pruned[name], pruned["own"])
    if is_dense:
        for name in ("own", "core 0.19"):
            out = ["--hf", str(tmp_path / f"hf {name}"), "--model-type", "mistral"]
            tokens = ["--vocab-size", str(LLAMA.vocab_size)]
            flags = ["export", "--load", str(forms / name), *out]
            succeed("tools.convert", [*flags, *tokens])
        own, foreign = (
            load_file(tmp_path / f"hf {name}" / "model.safetensors")
            for name in ("own", "core 0.19")
        )
        assert_same_bytes(own, foreign)


def test_a_tokenizer_says_how_many_tokens_there_are(forms, tmp_path):
    """Megatron-LM saves the padded size alone."""
    own, foreign = (checkpoints.read(str(forms / name)) for name in ("own", "core 0.19"))
    arch = own.arch
    assert (own.knows_tokens, foreign.knows_tokens) == (True, False)
    assert foreign.arch.vocab_size == arch.padded_vocab_size
    assert foreign.with_tokens(arch.vocab_size).arch == arch
    assert own.with_tokens(7) is own
    corpus = write_corpus(tmp_path / "corpus", arch.vocab_size)
    flags = [*data_flags(arch, corpus), "--calibration-samples", "4"]
    targets = ["--target-hidden-size", "16"]
    for name in ("own", "core 0.19"):
        where = ["--load", str(forms / name), "--save", str(tmp_path / name)]
        succeed("prune", [*where, *flags, *targets])
    pruned = [checkpoints.read(str(tmp_path / name)) for name in ("own", "core 0.19")]
    assert pruned[0].arch == pruned[1].arch
    assert pruned[1].knows_tokens
    out = ["export", "--load", str(forms / "core 0.19"), "--hf", str(tmp_path / "hf")]
    kind = "mixtral" if arch.num_experts else "llama"
    code, line = fail("tools.convert", [*out, "--model-type", kind, "--vocab-size", "200"])
    assert (code, "--vocab-size 200" in line) == (USAGE, True)


def test_optimizer_state_of_another_form_is_refused(forms, tmp_path):
    arch = checkpoints.read(str(forms / "own")).arch
    corpus = write_corpus(tmp_path / "corpus", arch.vocab_size)
    save = ["--save", str(tmp_path / "out"), "--save-interval", "9"]
    train = [*save, *["--train-iters", "6", "--lr", "1e-3", "--eval-iters", "0"]]
    flags = ["--load", str(forms / "core 0.19"), *data_flags(arch, corpus), *train]
    code, _ = fail("pretrain_distill", flags)
    assert code == CHECKPOINT
    succeed("pretrain_distill", [*flags, "--finetune", "--train-iters", "1"])


def bridge_yaml(arch):
    """Return a model section as Megatron Bridge writes it."""
    silu = {"_target_": "torch.nn.functional.silu", "_call_": False}
    return {
        "_target_": "os.system",
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.kv_channels,
        "seq_length": arch.max_position_embeddings,
        "vocab_size": arch.vocab_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "rotary_base": 10000.0,
        "share_embeddings_and_output_weights": False,
        "num_moe_experts": None,
        "moe_ffn_hidden_size": None,
        "moe_router_topk": 2,
        "bias_activation_fusion": True,
        "init_method_std": arch.init_method_std,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def in_half_precision(model):
    model.bfloat16()


def test_precision_of_a_checkpoint_that_does_not_say_it(tmp_path):
    own, nemo = str(tmp_path / "own"), tmp_path / "nemo"
    write_model(own, LLAMA, in_half_precision)
    run_ranks(1, rewrite, own, nemo, "NeMo", None, "weights")
    (nemo / "context").mkdir()
    (nemo / "context/model.yaml").write_text(yaml.safe_dump({"config": bridge_yaml(LLAMA)}))
    succeed("prune", ["--load", str(nemo), "--save", str(tmp_path / "pruned"), *RANDOM])
    for folder in (nemo, tmp_path / "pruned"):
        assert checkpoints.read(str(folder)).args["params_dtype"] == torch.bfloat16
    assert checkpoints.read(str(tmp_path / "pruned")).args["bf16"]


def test_sizes_of_bridge_and_nemo(tmp_path):
    own = str(tmp_path / "own")
    write_model(own, LLAMA)
    bridge, nemo = tmp_path / "bridge", tmp_path / "nemo"
    run_ranks(1, rewrite, own, bridge, "core 0.16", None)
    run_ranks(1, rewrite, own, nemo, "NeMo", None, "weights")
    code, line = fail("tools.inspect_checkpoint", ["--load", str(bridge)])
    assert (code, "no saved args and no run_config.yaml" in line) == (CHECKPOINT, True)
    config = {"model": bridge_yaml(LLAMA), "tokenizer": {"_target_": "os.system"}}
    (bridge / "iter_0000005/run_config.yaml").write_text(yaml.safe_dump(config))
    (nemo / "context").mkdir()
    model = {"_target_": "os.system", "config": bridge_yaml(LLAMA)}
    (nemo / "context/model.yaml").write_text(yaml.safe_dump(model))
    for folder in (bridge, nemo):
        assert checkpoints.read(str(folder)).with_tokens(LLAMA.vocab_size).arch == LLAMA
    logits = run_ranks(1, logits_of, [own, str(bridge), str(nemo)])[0]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    config["model"] |= {
        "window_size": [4095, 0],
        "no_rope_freq": 4,
        "yarn_rotary_scaling_factor": 2,
    }
    (bridge / "iter_0000005/run_config.yaml").write_text(yaml.safe_dump(config))
    found = checkpoints.read(str(bridge)).with_tokens(LLAMA.vocab_size).arch
    own_layers = {"window_size": "4095,0", "no_rope_freq": "[0,0,0,1]"}
    assert found == replace(LLAMA, **own_layers, rotary_scaling_factor=2)
    config["model"]["softmax_type"] = "learnable"
    (bridge / "iter_0000005/run_config.yaml").write_text(yaml.safe_dump(config))
    code, line = fail("tools.inspect_checkpoint", ["--load", str(bridge)])
    assert (code, "softmax_type is learnable" in line) == (CHECKPOINT, True)
    config["model"] = bridge_yaml(LLAMA) | {"num_layers": "4"}
    (bridge / "iter_0000005/run_config.yaml").write_text(yaml.safe_dump(config))
    code, line = fail("tools.inspect_checkpoint", ["--load", str(bridge)])
    assert (code, "the saved args do not describe a model" in line) == (CHECKPOINT, True)
    for text in ("model: !!python/object/apply:os.mkdir [x]", "{", "[]", "model:"):
        (bridge / "iter_0000005/run_config.yaml").write_text(text)
        code, line = fail("tools.inspect_checkpoint", ["--load", str(bridge)])
        assert (code, "run_config.yaml cannot be read" in line) == (CHECKPOINT, True)


def test_typed_sizes_of_a_checkpoint_that_says_none(tmp_path):
    own, bare = str(tmp_path / "own"), tmp_path / "bare"
    write_model(own, LLAMA)
    run_ranks(1, rewrite, own, bare, "core 0.16", None)
    keep_two = ["--target-num-layers", "2", *RANDOM]
    code, line = fail("prune", ["--load", str(bare), "--save", str(tmp_path / "no"), *keep_two])
    assert (code, "Type them: --num-layers" in line) == (CHECKPOINT, True)
    typed = megatron_command_line(LLAMA).split()
    for load, save, sizes in ((own, "a", []), (str(bare), "b", typed)):
        succeed("prune", ["--load", load, "--save", str(tmp_path / save), *keep_two, *sizes])
    assert_same_bytes(*(read_tensors(str(tmp_path / save)) for save in ("a", "b")))
    data = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size"]
    step = [*RANDOM[2:], *data, str(LLAMA.vocab_size), "--train-iters", "1", "--lr", "1"]
    step += ["--eval-iters", "0", "--num-workers", "0", *typed]
    for extra in (["--dry-run"], []):
        succeed("pretrain_distill", ["--load", str(bare), "--finetune", *step, *extra])
    pruned = checkpoints.read(str(tmp_path / "b")).with_tokens(LLAMA.vocab_size)
    assert pruned.arch == replace(LLAMA, num_layers=2)
    wrong = ["--load", str(bare), "--save", str(tmp_path / "c"), *keep_two, *typed]
    code, line = fail("prune", [*wrong, "--ffn-hidden-size", str(LLAMA.ffn_hidden_size + 8)])
    assert code == CHECKPOINT


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"scale_factor": 32.0}, {"use_rope_scaling": True, "rope_scaling_factor": 32.0}),
        ({"rope_scaling": False, "rope_scaling_factor": 8.0}, {"use_rope_scaling": False}),
        (
            {"gated_linear_unit": False, "activation_func": {"_target_": "a.squared_relu"}},
            {"squared_relu": True, "swiglu": False},
        ),
        (
            {
                "gated_linear_unit": False,
                "activation_func": {"_target_": "torch.nn.functional.gelu"},
                "add_bias_linear": True,
            },
            {"bias_gelu_fusion": True, "swiglu": False},
        ),
        ({"kv_channels": None, "num_query_groups": None}, {"kv_channels": 12}),
        ({"num_moe_experts": 4, "moe_ffn_hidden_size": 8}, {"num_experts": 4}),
    ],
)
def test_what_bridge_calls_otherwise(change, found):
    args = args_of(bridge_yaml(LLAMA) | change, 104)
    assert {name: args[name] for name in found} == found
    assert args["padded_vocab_size"] == 104


# What the files say of their models: sizes that differ from 2 layers of 32 channels, 4 heads in 2
# groups, 48 neurons, 64 positions.
WRITTEN = {
    "bridge-0.3.1-llama31": {
        "swiglu": True,
        "normalization": "RMSNorm",
        "use_rope_scaling": True,
        "vocab_size": 100,
    },
    "bridge-0.6.2-moe": {
        "swiglu": True,
        "normalization": "RMSNorm",
        "rope_scaling_factor": 1.0,
        "vocab_size": 100,
        "num_experts": 4,
        "moe_ffn_hidden_size": 16,
        "attention_dropout": 0.1,
        "hidden_dropout": 0.1,
    },
    "nemo-2.5.3-nemotron": {
        "squared_relu": True,
        "apply_layernorm_1p": True,
        "rotary_percent": 0.5,
        "kv_channels": 128,
        "init_method_std": 0.0134,
    },
}


@pytest.mark.parametrize("name", WRITTEN)
def test_files_that_bridge_and_nemo_wrote(name, tmp_path):
    """Parts of real ones: their first lines say how they were made."""
    text = (Path(__file__).parent / "foreign" / f"{name}.yaml").read_text()
    place = next(file for file, key in FILES.items() if key in yaml.safe_load(text))
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / place).parent.mkdir(exist_ok=True)
    (weights / place).write_text(text)
    common = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "max_position_embeddings": 64,
        "vocab_size": 128,
        "padded_vocab_size": 128,
        "position_embedding_type": "rope",
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    assert Arch.from_args(read_args(weights, 128)) == Arch(**common | WRITTEN[name])


def test_what_is_not_computed_is_refused_whoever_wrote_it(tmp_path):
    """Megatron-LM saves all of its flags; most of these leave no trace in the tensors."""
    plain = LLAMA.to_args()
    for name, allowed in UNSUPPORTED.items():
        for value in (None, *allowed):
            check_supported({name: value})
        for read in (
            lambda args: Arch.from_args(plain | args),
            lambda model: args_of(bridge_yaml(LLAMA) | model, 104),
        ):
            with pytest.raises(ValueError, match=f"{name} is .*, which is not computed here"):
                read({name: "mrope"})
    own = str(tmp_path / "own")
    write_model(own, LLAMA)
    args = plain | {"softmax_type": "off-by-one"}
    run_ranks(1, rewrite, own, tmp_path / "sinks", "core 0.19", args)
    code, line = fail("tools.inspect_checkpoint", ["--load", str(tmp_path / "sinks")])
    assert (code, "softmax_type is off-by-one" in line) == (CHECKPOINT, True)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.makedirs, (self.path, 0o777, True))


def rewrite_with_code(source, root, form, place, mark):
    code = Malicious(mark)
    args = LLAMA.to_args() | ({"code": code} if place == "args" else {})
    objects = [("decoder.layers.mlp.linear_fc1._extra_state", code)] if place == "object" else []
    rewrite(source, root, form, args, "release", objects)
    if place == ".metadata":
        spoil_metadata(root / "release", code)


def spoil_metadata(folder, code):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = code
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("form", "place"),
    [("core 0.16", "args"), ("core 0.16", ".metadata"), ("core 0.19", "args")],
)
def test_code_runs_only_where_it_is_trusted(form, place, tmp_path):
    own, root, mark = str(tmp_path / "own"), tmp_path / "foreign", tmp_path / "executed"
    write_model(own, LLAMA)
    run_ranks(1, rewrite_with_code, own, root, form, place, str(mark))
    out = ["--hf", str(tmp_path / "hf"), "--model-type", "mistral"]
    for program, flags in (
        ("tools.inspect_checkpoint", []),
        ("tools.convert", out),
        ("prune", ["--save", str(tmp_path / "p"), "--target-num-layers", "3", *RANDOM]),
    ):
        command = ["export"] * (program == "tools.convert") + ["--load", str(root), *flags]
        code, line = fail(program, command, 2 if program == "prune" else 1)
        assert code == CHECKPOINT
        assert "os.makedirs, which is refused; --trust-checkpoint" in line
        assert not mark.exists()
        succeed(program, [*command, "--trust-checkpoint"])
        assert mark.exists()
        mark.rmdir()


def read_with_core(folder):
    for read in (
        dist_checkpointing.load_common_state_dict,
        dist_checkpointing.serialization.load_common_state_dict,
        dist_checkpointing.load_content_metadata,
        lambda folder: dist_checkpointing.load({}, folder),
    ):
        with pytest.raises(pickle.UnpicklingError, match=r"os\.makedirs, which is refused"):
            read(folder)


@pytest.mark.parametrize("form", ["core 0.16", "core 0.19"])
def test_megatron_cores_own_readers_refuse_code_too(form, tmp_path):
    own, root, mark = str(tmp_path / "own"), tmp_path / "foreign", tmp_path / "executed"
    write_model(own, LLAMA)
    run_ranks(1, rewrite_with_code, own, root, form, "args", str(mark))
    run_ranks(1, read_with_core, str(root / "release"))
    assert not mark.exists()


def test_an_estimate_reads_what_is_trusted(tmp_path):
    own, root, mark = str(tmp_path / "own"), tmp_path / "foreign", tmp_path / "executed"
    write_model(own, LLAMA)
    run_ranks(1, rewrite_with_code, own, root, "core 0.16", "args", str(mark))
    flags = ["--load", str(root), "--seq-length", "16", "--micro-batch-size", "1"]
    code, line = fail("tools.estimate", flags)
    assert (code, "os.makedirs, which is refused" in line) == (CHECKPOINT, True)
    assert not mark.exists()
    succeed("tools.estimate", [*flags, "--trust-checkpoint"])
    assert mark.exists()


def test_objects_among_the_tensors_are_plain_or_refused(tmp_path):
    """Extra states are not read from other forms at all; where core reads them, they are plain."""
    own, mark = str(tmp_path / "own"), tmp_path / "executed"
    write_model(own, LLAMA)
    run_ranks(1, rewrite_with_code, own, tmp_path / "b", "core 0.16", "object", str(mark))
    run_ranks(1, logits_of, [str(tmp_path / "b")])
    where = ["--load", str(tmp_path / "b"), "--save", str(tmp_path / "pruned")]
    succeed("prune", [*where, *RANDOM, "--target-num-layers", "3"])
    assert not mark.exists()


# What Megatron-LM (check_checkpoint_args, load_args_from_checkpoint) and Megatron Bridge
# (its reader of Megatron-LM's checkpoints) read, most of it by plain attribute access.
READ = """
num_layers hidden_size num_attention_heads add_position_embedding max_position_embeddings
make_vocab_size_divisible_by tokenizer_type consumed_train_samples skipped_train_samples
consumed_valid_samples tensor_model_parallel_size pipeline_model_parallel_size world_size
data_parallel_size no_save_optim no_save_rng ckpt_fully_parallel_save ffn_hidden_size seq_length
num_query_groups group_query_attention kv_channels position_embedding_type rotary_base
rotary_percent rotary_interleaved add_bias_linear add_qkv_bias squared_relu swiglu
untie_embeddings_and_output_weights apply_layernorm_1p normalization attention_dropout
hidden_dropout num_experts tokenizer_model padded_vocab_size ckpt_format
heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json moe_layer_freq
moe_router_topk moe_router_pre_softmax moe_grouped_gemm moe_ffn_hidden_size
moe_shared_expert_intermediate_size moe_token_dispatcher_type multi_latent_attention
no_persist_layer_norm norm_epsilon params_dtype overlap_p2p_comm decoder_first_pipeline_num_layers
decoder_last_pipeline_num_layers fp8_param_gather bias_swiglu_fusion bias_gelu_fusion
init_method_xavier_uniform config_logger_dir cp_comm_type is_hybrid_model transformer_impl
qk_layernorm qk_l2_norm mtp_num_layers fp16 bf16 fp16_lm_cross_entropy use_rope_scaling
init_model_with_meta_device moe_use_legacy_grouped_gemm
"""


@pytest.mark.parametrize("arch", [LLAMA, GPT2, MOE], ids=["llama", "gpt2", "moe"])
def test_saved_args_have_what_others_read(arch, tmp_path):
    """A checkpoint of this package, trained, and one that was pruned from Megatron-LM's."""
    own, foreign, pruned, student = (str(tmp_path / x) for x in ("own", "b", "pruned", "student"))
    write_model(own, arch)
    run_ranks(1, rewrite, own, tmp_path / "b", "core 0.16", arch.to_args())
    succeed("prune", ["--load", foreign, "--save", pruned, *RANDOM, "--target-num-layers", "3"])
    corpus = write_corpus(tmp_path / "corpus", arch.vocab_size)
    save = ["--save", student, "--save-interval", "1", "--load", pruned]
    train = [*save, *["--train-iters", "1", "--lr", "1e-3", "--eval-iters", "0", "--finetune"]]
    succeed("pretrain_distill", [*data_flags(arch, corpus), *train])
    for folder in (pruned, student):
        source = checkpoints.read(folder)
        args = source.args
        assert not [name for name in READ.split() if name not in args]
        assert all(type(x) in (*saved_args.PLAIN, list, dict) for x in args.values())
        assert args["num_layers"] == 3
        assert args["add_position_embedding"]  # what Megatron-LM has unless a flag is typed
        assert args["padded_vocab_size"] == arch.padded_vocab_size
        assert args["make_vocab_size_divisible_by"] <= arch.padded_vocab_size
        assert args["transformer_impl"] in ("local", "transformer_engine")
        assert (source.folder / "megatron_args.sh").exists()
        assert source.arch == replace(arch, num_layers=3)


def test_precision_in_saved_args_is_that_of_the_weights():
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        args = saved_args.complete(LLAMA, {"params_dtype": dtype, "bf16": False})
        assert getattr(args, name)
        assert args.bf16 + args.fp16 == 1
    args = saved_args.complete(LLAMA, {"scope": enums.AttnBackend.auto, "x": [print], "y": {1: 2}})
    assert not {"scope", "x", "y"} & vars(args).keys()
