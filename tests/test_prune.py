"""prune.py as a user runs it: layouts, identity, masked = trimmed, its files, what it refuses."""

import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from megatron_ext.arch import Arch, shape, weights
from megatron_ext.checkpoint import checkpoints
from megatron_ext.cli.programs import megatron_command_line
from megatron_ext.pruning.plan import load_plan
from megatron_ext.pruning.scores_file import load_scores, save_scores
from megatron_ext.runtime.errors import CHECKPOINT, DATA, USAGE
from tests.models import BERT, GPT2, LLAMA, MOE, NEMOTRON, WINDOWS
from tests.programs import (
    LAYOUTS,
    assert_same_bytes,
    data_flags,
    fail,
    logits_of,
    model_flags,
    read_model,
    read_tensors,
    run_program,
    succeed,
    write_corpus,
    write_model,
)
from tests.ranks import run_ranks
from tests.test_trim import hand_on, output_matrices, without

MODELS = {
    "llama": LLAMA,
    "windows": WINDOWS,
    "gpt2": GPT2,
    "nemotron": NEMOTRON,
    "bert": BERT,
    "moe": MOE,
}
TARGETS = {
    "llama": {"num_layers": 3, "hidden_size": 40, "ffn_hidden_size": 48, "num_attention_heads": 2},
    "windows": {"num_layers": 2, "hidden_size": 40, "num_query_groups": 1},
    "gpt2": {"num_layers": 2, "hidden_size": 28, "ffn_hidden_size": 34, "num_attention_heads": 2},
    "nemotron": {
        "num_layers": 3,
        "hidden_size": 22,
        "ffn_hidden_size": 40,
        "num_attention_heads": 4,
    },
    "bert": {"num_layers": 3, "hidden_size": 26, "ffn_hidden_size": 32, "num_attention_heads": 2},
    "moe": {
        "num_layers": 3,
        "hidden_size": 20,
        "num_attention_heads": 2,
        "num_experts": 3,
        "moe_ffn_hidden_size": 12,
        "moe_shared_expert_intermediate_size": 8,
    },
}
MIXED = {
    "DP2xTP2": (4, "--tensor-model-parallel-size 2"),
    "PP2 uneven": (
        2,
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tttL",
    ),
}
EP2 = {
    "EP2": (2, "--expert-model-parallel-size 2"),
    "TP2+SP x EP2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2",
    ),
}
NO_DATA = ["--seq-length", "16", "--micro-batch-size", "1"]


def target_flags(sizes):
    return [word for k, v in sizes.items() for word in ("--target-" + k.replace("_", "-"), str(v))]


class Source:
    """A checkpoint with random weights, a corpus for it, and what TP1 makes of them."""

    def __init__(self, folder, name):
        self.name, self.arch, self.load = name, MODELS[name], str(folder / "model")
        self.corpus = data_flags(self.arch, write_corpus(folder / "corpus", self.arch.vocab_size))
        self.data = [*self.corpus, "--calibration-samples", "8"]
        self.targets = target_flags(TARGETS[name])
        self.scores, self.plan, self.save = (str(folder / x) for x in ("scores", "plan", "pruned"))
        write_model(self.load, self.arch)
        files = ["--scores", self.scores, "--plan", self.plan, "--save", self.save]
        succeed("prune", ["--load", self.load, *self.data, *self.targets, *files])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return {name: Source(tmp_path_factory.mktemp(name), name) for name in MODELS}


@pytest.fixture(scope="module")
def llama(sources):
    return sources["llama"]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("llama", layout) for layout in [*LAYOUTS, *MIXED] if layout != "TP1"),
        *(
            (name, layout)
            for name in ("windows", "gpt2", "nemotron")
            for layout in ("TP2+SP", "PP2", "CP2")
        ),
        *(("bert", layout) for layout in ("TP2+SP", "PP2", "DP2", "CP2")),
        *(("moe", layout) for layout in ("TP2+SP", "PP2", "CP2", "DP2", *EP2)),
    ],
)
def test_no_layout_changes_scores_plan_or_bytes(name, layout, sources, tmp_path):
    source, (world_size, flags) = sources[name], (LAYOUTS | MIXED | EP2)[layout]
    scores, plan, save = (str(tmp_path / x) for x in ("scores", "plan", "pruned"))
    argv = ["--load", source.load, *source.data, *source.targets, *flags.split()]
    succeed("prune", [*argv, "--scores", scores, "--plan", plan, "--save", save], world_size)

    ours, theirs = load_scores(scores), load_scores(source.scores)
    assert replace(ours, vectors={}) == replace(theirs, vectors={})
    assert ours.vectors.keys() == theirs.vectors.keys()
    for axis, vector in theirs.vectors.items():
        # A neuron that hardly ever fires has a score near 0, of which the digits are rounding.
        tolerance = 1e-7 * vector.max().item()
        torch.testing.assert_close(ours.vectors[axis], vector, rtol=1e-5, atol=tolerance)
    assert load_plan(plan) == load_plan(source.plan)
    assert_same_bytes(read_tensors(save), read_tensors(source.save))


@pytest.mark.parametrize("name", MODELS)
def test_pruning_to_the_same_sizes_returns_the_same_bytes(name, sources, tmp_path):
    source, save = sources[name], str(tmp_path / "same")
    argv = ["--load", source.load, *source.data, "--save", save]
    layout = EP2["EP2"] if source.arch.num_experts else LAYOUTS["TP2"]
    succeed("prune", [*argv, *layout[1].split()], 2)
    assert_same_bytes(read_tensors(save), read_tensors(source.load))
    assert checkpoints.read(save).arch == source.arch


@pytest.mark.parametrize("name", MODELS)
def test_the_pruned_checkpoint_describes_itself(name, sources):
    source = sources[name]
    pruned = checkpoints.read(source.save)
    target = pruned.arch
    assert (pruned.folder.name, pruned.iteration) == ("release", 0)
    assert {size: getattr(target, size) for size in TARGETS[name]} == TARGETS[name]
    assert (pruned.folder / "plan.json").read_text() == Path(source.plan).read_text()
    assert shlex.split((pruned.folder / "megatron_args.sh").read_text()) == model_flags(target)
    assert {key: tuple(t.shape) for key, t in read_tensors(source.save).items()} == {
        w.key: (target.num_layers,) * w.per_layer + shape(w, target) for w in weights(target)
    }


TARGETS_FILE = """
half: {hidden_size: 24, num_query_groups: 1}
shallow: {num_layers: 3}
"""


def test_several_targets_share_one_set_of_scores(llama, tmp_path):
    """Each is what a run of its own from the same scores makes; the scores are measured once."""
    targets, save, plans = (tmp_path / name for name in ("targets.yaml", "save", "plans"))
    targets.write_text(TARGETS_FILE)
    argv = ["--load", llama.load, *llama.data, "--targets", str(targets)]
    argv += ["--save", str(save), "--plan", str(plans)]
    (outcome, _) = succeed("prune", [*argv, *LAYOUTS["TP2"][1].split()], 2)
    assert outcome.stderr.count("calibration:   0%") == 1  # a bar begins once, and may end twice
    for name, sizes in yaml.safe_load(TARGETS_FILE).items():
        alone = str(tmp_path / name)
        argv = ["--load", llama.load, *NO_DATA, "--scores", llama.scores, *target_flags(sizes)]
        succeed("prune", [*argv, "--save", alone])
        assert_same_bytes(read_tensors(str(save / name)), read_tensors(alone))
        assert load_plan(plans / f"{name}.json") == load_plan(f"{alone}/release/plan.json")
    assert checkpoints.read(str(save / "half")).arch.num_attention_heads == 2


@pytest.mark.parametrize(
    ("text", "extra", "words"),
    [
        ("a: {hidden_sice: 8}", "", ["a: hidden_sice", "hidden_size"]),
        ("a: {hidden_size: 49}", "", ["a: --target-hidden-size 49", "48"]),
        ("a: {num_experts: 2}", "", ["a: --target-num-experts 2", "none"]),
        ("../a: {hidden_size: 8}", "", ["../a", "name"]),
        ("- hidden_size", "", ["needs lines like"]),
        ("{", "", ["cannot be read"]),
        ("a: {hidden_size: 8}", "--target-num-layers 2", ["--targets", "--target-num-layers"]),
        ("a: {hidden_size: 8}", "--prune-iterations 2", ["--targets", "--prune-iterations 2"]),
    ],
)
def test_bad_targets(text, extra, words, llama, tmp_path):
    targets, save = tmp_path / "targets.yaml", tmp_path / "save"
    targets.write_text(text)
    argv = ["--load", llama.load, *llama.data, "--targets", str(targets), "--save", str(save)]
    code, message = fail("prune", [*argv, *extra.split()])
    assert code == USAGE
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert not save.exists()


# Masked = trimmed, in float64: what differs is a mistake.


def mask(model, plan):
    """Switch off in a whole model the units that ``plan`` drops; its norms see the kept ones."""

    def kept(units, length):
        return torch.tensor([unit in units for unit in range(length)]).double()

    arch = plan.source
    hidden = kept(plan.kept["hidden"], arch.hidden_size)
    norms = [model.decoder.final_layernorm]
    for table in model.embedding.parameters():
        table.data *= hidden
    if arch.is_bert:
        norms.append(model.lm_head.layer_norm)
    for number, layer in enumerate(model.decoder.layers):
        heads = kept(plan.kept.get(f"heads.{number}", ()), arch.num_attention_heads)
        outputs = [(layer.self_attention.linear_proj, heads.repeat_interleave(arch.kv_channels))]
        matrices = output_matrices(layer.mlp)
        if arch.num_experts is None:
            outputs += [
                (matrices[0], kept(plan.kept.get(f"ffn.{number}", ()), arch.ffn_hidden_size))
            ]
        else:
            for expert in range(arch.num_experts):
                neurons = plan.kept.get(f"moe_ffn.{number}.{expert}", ())
                outputs += [(matrices[expert], kept(neurons, arch.moe_ffn_hidden_size))]
            shared = arch.moe_shared_expert_intermediate_size
            outputs += [(matrices[-1], kept(plan.kept.get(f"shared_ffn.{number}", ()), shared))]
            if number in plan.kept["layers"]:
                router = layer.mlp.router
                router.gating = without(plan.kept[f"experts.{number}"], router.gating)
        for linear, inputs in outputs:
            linear.weight.data *= hidden.outer(inputs)
            if linear.bias is not None:
                linear.bias.data *= hidden * (number in plan.kept["layers"])
        norms += [layer.input_layernorm, layer.pre_mlp_layernorm]
        if arch.sandwich_norm:
            norms += [linear.post_layernorm for linear, _ in outputs]
        if arch.apply_residual_connection_post_layernorm and number not in plan.kept["layers"]:
            layer.forward = hand_on
    for norm in norms:
        norm.forward = norm_over(norm, list(plan.kept["hidden"]))


def norm_over(norm, channels):
    """Return the naive norm over some channels; the others come out as zero."""

    def forward(x):
        kept = x[..., channels]
        if not norm.is_rms:
            kept = kept - kept.mean(dim=-1, keepdim=True)
        kept = kept / (kept.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
        kept = kept * (norm.weight[channels] + norm.offset)
        result = torch.zeros_like(x)
        result[..., channels] = kept if norm.is_rms else kept + norm.bias[channels]
        return result

    return forward


def logits_masked(load, plan):
    """Return logits of the source as it is and masked."""
    model, plan = read_model(load), load_plan(plan)
    before = logits_of(model, plan.source)
    mask(model, plan)
    return before, logits_of(model, plan.source)


def logits_loaded(load):
    return logits_of(read_model(load), checkpoints.read(load).arch)


@pytest.mark.parametrize(
    ("name", "axis"), [(name, axis) for name in MODELS for axis in [*TARGETS[name], "all"]]
)
def test_trimmed_equals_masked(name, axis, sources, tmp_path):
    source, save, plan = sources[name], str(tmp_path / "pruned"), str(tmp_path / "plan")
    sizes = TARGETS[name] if axis == "all" else {axis: TARGETS[name][axis]}
    argv = ["--load", source.load, *NO_DATA, "--scores", source.scores, *target_flags(sizes)]
    succeed("prune", [*argv, "--plan", plan, "--save", save])
    before, masked = run_ranks(1, logits_masked, source.load, plan)[0]
    trimmed = run_ranks(1, logits_loaded, save)[0]
    torch.testing.assert_close(trimmed, masked, rtol=1e-10, atol=1e-10)
    assert (masked - before).abs().max() > 1e-2, "the units that were dropped do nothing"


def permute(model, arch: Arch):
    """Put channels, neurons, query groups and the heads of each group into another order."""
    generator = torch.Generator().manual_seed(4)

    def shuffled(length):
        return torch.randperm(length, generator=generator)

    def take(module, axis, order):
        for parameter in module.parameters(recurse=False):
            if axis < parameter.ndim:
                parameter.copy_(parameter.index_select(axis, order))

    hidden, groups = shuffled(arch.hidden_size), arch.num_query_groups
    per_group, width = arch.num_attention_heads // groups, arch.kv_channels
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        order = shuffled(groups)
        queries = torch.stack([shuffled(per_group) for _ in range(groups)])
        key_value = torch.tensor([per_group, per_group + 1]).expand(groups, 2)
        blocks = order[:, None] * (per_group + 2) + torch.cat([queries, key_value], dim=1)
        take(attention.linear_qkv, 0, rows_of(blocks, width))
        take(attention.linear_proj, 1, rows_of(order[:, None] * per_group + queries, width))
        neurons = shuffled(arch.ffn_hidden_size)
        halves = [neurons, neurons + arch.ffn_hidden_size] if arch.swiglu else [neurons]
        take(mlp.linear_fc1, 0, torch.cat(halves))
        take(mlp.linear_fc2, 1, neurons)
        for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
            take(norm, 0, hidden)
        for linear in (attention.linear_qkv, mlp.linear_fc1):
            linear.weight.copy_(linear.weight[:, hidden])
        for linear in (attention.linear_proj, mlp.linear_fc2):
            take(linear, 0, hidden)
    take(model.decoder.final_layernorm, 0, hidden)
    tables = list(model.embedding.parameters())
    if arch.untie_embeddings_and_output_weights:
        tables += model.output_layer.parameters()
    for table in tables:
        table.copy_(table[:, hidden])


def rows_of(blocks, width):
    return (blocks.flatten()[:, None] * width + torch.arange(width)).flatten()


@pytest.mark.parametrize("name", ["llama", "gpt2", "nemotron"])
def test_the_order_of_units_does_not_matter(name, sources, tmp_path):
    """A model and the same with permuted units compute the same, before and after pruning."""
    source, other, save = sources[name], str(tmp_path / "permuted"), str(tmp_path / "pruned")
    write_model(other, source.arch, permute, source.arch)
    succeed("prune", ["--load", other, *source.data, *source.targets, "--save", save])
    assert not torch.equal(
        *(read_tensors(x)[weights(source.arch)[0].key] for x in (other, source.load))
    )
    for left, right in ((other, source.load), (save, source.save)):
        logits = [run_ranks(1, logits_loaded, folder)[0] for folder in (left, right)]
        torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-10)


# Files between the steps.


def test_scores_and_plan_replace_the_steps_before_them(llama, tmp_path):
    argv, expected = ["--load", llama.load, *NO_DATA], read_tensors(llama.save)
    plan = ["--plan", llama.plan]
    for number, given in enumerate(
        (["--scores", llama.scores, *llama.targets], plan, [*plan, *llama.targets])
    ):
        save = str(tmp_path / str(number))
        succeed("prune", [*argv, *given, "--save", save])
        assert_same_bytes(read_tensors(save), expected)


def test_steps_run_one_by_one(llama, tmp_path):
    """Scores alone, a plan alone from them, and then the cut alone: no other file appears."""
    argv, (scores, plan, save) = ["--load", llama.load], (tmp_path / x for x in "spc")
    succeed("prune", [*argv, *llama.data, "--scores", str(scores)])
    assert list(tmp_path.iterdir()) == [scores]
    succeed(
        "prune", [*argv, *NO_DATA, "--scores", str(scores), "--plan", str(plan), *llama.targets]
    )
    assert sorted(tmp_path.iterdir()) == [plan, scores]
    succeed("prune", [*argv, *NO_DATA, "--plan", str(plan), "--save", str(save)])
    assert_same_bytes(read_tensors(str(save)), read_tensors(llama.save))


def test_from_training_to_a_pruned_model_that_trains_and_is_pruned_again(llama, tmp_path):
    teacher, pruned, student, smaller = (str(tmp_path / x) for x in ("t", "p", "s", "q"))
    train = shlex.split(
        f"{shlex.join(llama.corpus)} --lr 1e-3 --train-iters 2 --save-interval 2 --bf16 "
        "--eval-iters 0 --global-batch-size 2"
    )
    succeed("pretrain_distill", [*train, *model_flags(LLAMA), "--save", teacher])

    sizes = target_flags({"num_layers": 2, "hidden_size": 40, "ffn_hidden_size": 64})
    argv = [*llama.data, "--load", teacher, "--save", pruned, "--bf16", *sizes]
    succeed("prune", [*argv, *LAYOUTS["PP2"][1].split()], 2)
    tensors = read_tensors(pruned)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not any(key.startswith("optimizer") for key in tensors)

    argv = [*train, "--load", pruned, "--teacher-load", teacher, "--save", student]
    succeed("pretrain_distill", [*argv, *LAYOUTS["TP2+SP"][1].split()], 2)
    trained = checkpoints.read(student)
    assert (trained.iteration, trained.arch) == (2, checkpoints.read(pruned).arch)

    sizes = target_flags({"hidden_size": 24, "num_attention_heads": 2})
    argv = [*llama.data, "--load", student, "--save", smaller, "--bf16", *sizes]
    succeed("prune", [*argv, *LAYOUTS["TP2"][1].split()], 2)
    expected = replace(trained.arch, hidden_size=24, num_attention_heads=2)
    assert checkpoints.read(smaller).arch == expected


# What is refused: one line on rank 0, one code on every rank, nothing left in --save.


def damaged_scores(llama, path):
    text = Path(llama.scores).read_bytes()
    path.write_bytes(text[: len(text) // 2])


def nan_scores(llama, path):
    scores = load_scores(llama.scores)
    vectors = {**scores.vectors, "ffn.2": scores.vectors["ffn.2"] * float("nan")}
    save_scores(path, replace(scores, vectors=vectors))


def scores_of_another(llama, path):
    scores = load_scores(llama.scores)
    save_scores(path, replace(scores, source=replace(scores.source, num_layers=5)))


def plan_of_another(llama, path):
    values = json.loads(Path(llama.plan).read_text())
    values["source"]["rotary_base"] = values["target"]["rotary_base"] = 500
    path.write_text(json.dumps(values))


def plan_without_a_layer(llama, path):
    values = json.loads(Path(llama.plan).read_text())
    values["heads"].popitem()
    path.write_text(json.dumps(values))


def half_a_plan(llama, path):
    path.write_text(Path(llama.plan).read_text()[:200])


@pytest.mark.parametrize(
    ("make", "flag", "words"),
    [
        (damaged_scores, "--scores", ["{path}", "remove it to score again"]),
        (nan_scores, "--scores", ["--scores", "NaN", "ffn.2"]),
        (scores_of_another, "--scores", ["--scores", "another model", "num_layers 5"]),
        (plan_of_another, "--plan", ["--plan", "another model", "rotary_base 500"]),
        (plan_without_a_layer, "--plan", ["--plan {path}", "heads names layers"]),
        (half_a_plan, "--plan", ["--plan {path}", "cannot be read"]),
    ],
)
def test_bad_files(make, flag, words, llama, tmp_path):
    path, save = tmp_path / "file", tmp_path / "save"
    make(llama, path)
    argv = ["--load", llama.load, *NO_DATA, flag, str(path), "--save", str(save)]
    code, message = fail("prune", [*argv, *llama.targets * (flag == "--scores")], 2)
    assert code == CHECKPOINT
    assert all(word.format(path=path) in message for word in words), message
    assert "\n" not in message
    assert not save.exists()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--target-hidden-size 49", USAGE, ["--target-hidden-size 49", "48"]),
        ("--target-num-layers 5", USAGE, ["--target-num-layers 5", "4"]),
        ("--target-num-attention-heads 3", USAGE, ["--target-num-attention-heads 3", "2"]),
        ("--target-hiden-size 8", USAGE, ["--target-hiden-size", "--target-hidden-size"]),
        ("--calibration-samples 7", USAGE, ["--calibration-samples 7", "2 data-parallel ranks"]),
        ("--tensor-model-parallel-size 4", USAGE, ["--tensor-model-parallel-size 4"]),
        ("--load {tmp}/none", CHECKPOINT, ["{tmp}/none", "no finished checkpoint"]),
        ("--vocab-size 64", CHECKPOINT, ["100 tokens", "64", "--tokenizer-model"]),
        ("--data-path {tmp}/none", DATA, ["{tmp}/none.idx", "no such file"]),
        ("--calibration-samples 512", DATA, ["--calibration-samples 512", "has only", "of 16"]),
        ("--save {save}", USAGE, ["--save", "a checkpoint is there already"]),
        ("--plan {plan} --target-hidden-size 32", USAGE, ["--plan {plan}", "--target"]),
        ("--scores {tmp}/file/scores", USAGE, ["--scores", "{tmp}/file is no folder"]),
        ("--plan {tmp}/file/plan", USAGE, ["--plan", "{tmp}/file is no folder"]),
        ("--save {tmp}/file", USAGE, ["--save", "{tmp}/file is no folder"]),
        ("--target-num-experts 2", USAGE, ["--target-num-experts 2", "none"]),
        ("--expert-model-parallel-size 2", USAGE, ["--expert-model-parallel-size", "experts"]),
    ],
)
def test_bad_flags(flags, code, words, llama, tmp_path):
    (tmp_path / "file").write_text("in the way")
    places = {"tmp": tmp_path, "save": llama.save, "plan": llama.plan}
    argv = ["--load", llama.load, *llama.data, "--save", str(tmp_path / "save")]
    before = read_tensors(llama.save)
    result, message = fail("prune", [*argv, *flags.format(**places).split()], 2)
    assert result == code, message
    assert all(word.format(**places) in message for word in words), message
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert_same_bytes(read_tensors(llama.save), before)


def test_model_flags_are_compared_with_the_checkpoint(llama, tmp_path):
    """${MODEL_ARGS} of a launch script are typed at pruning as they are."""
    same = [*megatron_command_line(llama.arch).split(), "--no-masked-softmax-fusion"]
    argv = ["--load", llama.load, *llama.data, *llama.targets, "--save", str(tmp_path / "save")]
    succeed("prune", [*argv, *same])
    assert_same_bytes(read_tensors(str(tmp_path / "save")), read_tensors(llama.save))
    shutil.rmtree(tmp_path / "save")
    for extra in ([], ["--dry-run"]):
        typed = [*same, "--hidden-size", "50", "--attention-dropout", "0.3", *extra]
        code, message = fail("prune", [*argv, *typed])
        lines = [line.split() for line in message.splitlines()[-2:]]
        assert code == CHECKPOINT
        assert lines == [
            ["flag", "checkpoint", "command", "line"],
            ["--hidden-size", str(llama.arch.hidden_size), "50"],
        ]
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize("verify", [[], ["--no-verify-integrity"]], ids=["hashes", "no hashes"])
@pytest.mark.parametrize("kind", ["short", "missing"])
def test_a_damaged_source(kind, verify, llama, tmp_path):
    load, save = tmp_path / "damaged", tmp_path / "save"
    shutil.copytree(llama.load, load)
    shard = next((load / "release").glob("*.distcp"))
    if kind == "short":
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    else:
        shard.unlink()
    argv = ["--load", str(load), *NO_DATA, *verify, "--plan", llama.plan, "--save", str(save)]
    code, message = fail("prune", argv, 2)
    assert code == CHECKPOINT
    assert str(shard) in message
    assert "\n" not in message
    assert not save.exists() or not list(save.iterdir())


def poison(model):
    model.decoder.layers[1].mlp.linear_fc2.weight[3, 5] = float("nan")


def test_a_source_with_nan_weights(llama, tmp_path):
    load, save = str(tmp_path / "nan"), tmp_path / "save"
    write_model(load, LLAMA, poison)
    argv = ["--load", load, *llama.data, *llama.targets, "--save", str(save)]
    code, message = fail("prune", argv, 2)
    assert code == CHECKPOINT
    assert f"{load}/release: decoder.layers.1.mlp.linear_fc2.weight has NaN" in message
    assert not save.exists()


# Killed while it writes: what was there stays, and the same command again makes the same.


def die_while_writing():
    def die(*_, **__):
        os._exit(9)

    torch.distributed.checkpoint.FileSystemWriter.write_data = die


def test_killed_while_trimming(llama, tmp_path):
    save, plan = tmp_path / "save", str(tmp_path / "plan")
    argv = ["--load", llama.load, *NO_DATA, "--scores", llama.scores, *llama.targets]
    argv += ["--plan", plan, "--save", str(save)]
    before = read_tensors(llama.load)
    with pytest.raises(AssertionError, match="died"):
        run_program("prune", argv, 2, die_while_writing)
    assert checkpoints.find(str(save)) is None
    assert_same_bytes(read_tensors(llama.load), before)
    succeed("prune", argv, 2)
    assert_same_bytes(read_tensors(str(save)), read_tensors(llama.save))
    assert sorted(path.name for path in save.iterdir()) == [
        "latest_checkpointed_iteration.txt",
        "release",
    ]


def foreign(folder, kind):
    folder.mkdir()
    if kind == "hugging face":
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"")
    elif kind == "one file per rank":
        (folder / "latest_checkpointed_iteration.txt").write_text("7")
        (folder / "iter_0000007" / "mp_rank_00").mkdir(parents=True)
        torch.save({}, folder / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt")
    else:
        (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
        for name in (".metadata", "common.pt"):
            (folder / name).write_bytes(b"" if kind == "empty files" else b"not a pickle")


@pytest.mark.parametrize(
    "kind", ["hugging face", "one file per rank", "another format", "empty files"]
)
def test_a_foreign_checkpoint(kind, tmp_path):
    foreign(tmp_path / "load", kind)
    argv = ["--load", str(tmp_path / "load"), *NO_DATA, "--mock-data"]
    code, message = fail("prune", [*argv, "--save", str(tmp_path / "save")], 2)
    assert code == CHECKPOINT
    assert str(tmp_path / "load") in message
    assert "weights_only" not in message  # torch's advice, to run what the file brings along
    assert "\n" not in message
    assert not (tmp_path / "save").exists()


def test_a_target_that_the_layout_does_not_fit_is_noted(llama, tmp_path):
    """No error: the student may get another layout, and the plan is the same under all."""
    argv = ["--load", llama.load, *NO_DATA, "--scores", llama.scores, "--save", str(tmp_path)]
    argv += [*target_flags({"ffn_hidden_size": 47}), *LAYOUTS["TP2"][1].split()]
    outcome, other = succeed("prune", argv, 2)
    assert "NOTE: what is pruned will not load under this layout" in outcome.stdout
    assert "--ffn-hidden-size, 47" in outcome.stdout
    assert not other.stdout
