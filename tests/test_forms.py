"""convert layers: one model under the names of a GPTModel and of a HybridModel."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_ext.checkpoint import checkpoints
from megatron_ext.checkpoint.slices import SliceReader
from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.open import restore_weights
from megatron_ext.pruning.plan import load_plan
from megatron_ext.pruning.planner import make_plan
from megatron_ext.pruning.scores import Scores
from megatron_ext.pruning.targets import target_arch
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import CHECKPOINT, USAGE, UserError
from tests import test_engine_layers
from tests.engine import ENGINE, stand_in
from tests.models import BERT, GPT2, LLAMA, MOE, NEMOTRON
from tests.programs import (
    LAYOUTS,
    assert_same_bytes,
    data_flags,
    fail,
    read_metrics,
    read_tensors,
    succeed,
    write_corpus,
    write_model,
)
from tests.ranks import run_ranks

TIED = replace(GPT2, num_layers=3)
TRAIN = (
    "--finetune --train-iters 2 --lr 1e-3 --global-batch-size 4 --eval-iters 0 --log-interval 1 "
    "--save-interval 2"
)


def convert(source, save, to, ranks=1):
    argv = ["layers", "--load", str(source), "--save", str(save), "--to", to]
    return succeed("tools.convert", argv, ranks)[0].stdout


@pytest.mark.parametrize("arch", [LLAMA, TIED, MOE], ids=["llama", "gpt2", "moe"])
def test_there_and_back_every_byte_is_the_same(arch, tmp_path):
    gpt, hybrid, back = tmp_path / "gpt", tmp_path / "hybrid", tmp_path / "back"
    write_model(str(gpt), arch)
    convert(gpt, hybrid, "hybrid", ranks=2)
    assert checkpoints.read(str(hybrid)).arch == arch.by_sublayers()
    # What a HybridModel with the same seed writes.
    write_model(str(tmp_path / "built"), arch.by_sublayers())
    assert_same_bytes(read_tensors(str(hybrid)), read_tensors(str(tmp_path / "built")))
    convert(hybrid, back, "gpt")
    assert checkpoints.read(str(back)).arch == arch
    assert_same_bytes(read_tensors(str(back)), read_tensors(str(gpt)))
    lines = [(x / "release/megatron_args.sh").read_text() for x in (hybrid, back)]
    assert f"--hybrid-layer-pattern '{arch.pattern}'" in lines[0]
    assert f"--num-layers {arch.num_layers} " in lines[1]
    assert "hybrid" not in lines[1]


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    write_model(str(folder / "gpt"), LLAMA)
    convert(folder / "gpt", folder / "hybrid", "hybrid")
    write_corpus(folder / "corpus", LLAMA.vocab_size)
    return folder


def train(forms, form, save, layout):
    ranks, words = LAYOUTS[layout]
    argv = ["--load", str(forms / form), "--save", str(save), *TRAIN.split(), *shlex.split(words)]
    succeed("pretrain_distill", [*argv, *data_flags(LLAMA, str(forms / "corpus"))], ranks)
    return read_metrics(str(save))


@pytest.mark.parametrize("layout", ["TP1", "TP2+SP", "PP2", "TP2xPP2"])
def test_both_forms_train_alike(layout, forms, tmp_path):
    """To the last digit, and so does what a HybridModel has trained, as a GPTModel again."""
    gpt, hybrid = (train(forms, form, tmp_path / form, layout) for form in ("gpt", "hybrid"))
    names = ("lm loss", "grad-norm")
    assert [[line[n] for n in names] for line in gpt] == [[x[n] for n in names] for x in hybrid]
    convert(tmp_path / "hybrid", tmp_path / "back", "gpt")
    trained = read_tensors(str(tmp_path / "gpt"))
    back = read_tensors(str(tmp_path / "back"))
    assert_same_bytes({key: trained[key] for key in back}, back)
    source = checkpoints.read(str(tmp_path / "back"))
    assert (source.folder.name, source.arch) == ("release", LLAMA)


def states_of_both(folder):
    """Return whether a HybridModel of Transformer Engine's layers finds all of its objects."""
    stand_in()
    groups = platform.initialize().groups
    chunks = build_model(NEMOTRON, ModelOptions(**ENGINE), groups, seed=5)
    test_engine_layers.save(f"{folder}/gpt", NEMOTRON, chunks)
    return test_engine_layers.logits(NEMOTRON, chunks)


def read_hybrid(folder):
    stand_in()
    groups = platform.initialize().groups
    arch = NEMOTRON.by_sublayers()
    chunks = build_model(arch, ModelOptions(**ENGINE), groups)
    restore_weights(chunks, checkpoints.read(f"{folder}/hybrid"))
    wanted = chunks[0].sharded_state_dict()
    objects = {x.unique_key for x in wanted.values() if isinstance(x, ShardedObject)}
    absent = objects - SliceReader(f"{folder}/hybrid/release").objects
    return test_engine_layers.logits(arch, chunks), absent


def test_transformer_engines_objects_go_along(tmp_path):
    (before,) = run_ranks(1, states_of_both, str(tmp_path))
    convert(tmp_path / "gpt", tmp_path / "hybrid", "hybrid")
    ((after, absent),) = run_ranks(1, read_hybrid, str(tmp_path))
    assert torch.equal(before, after)
    assert not absent


def test_the_plan_goes_along(forms, tmp_path):
    argv = ["--load", str(forms / "gpt"), "--save", str(tmp_path / "pruned")]
    random = ["--importance", "random", "--seq-length", "16", "--micro-batch-size", "1"]
    sizes = ["--target-num-layers", "3", "--target-hidden-size", "32"]
    succeed("prune", [*argv, *random, *sizes])
    convert(tmp_path / "pruned", tmp_path / "hybrid", "hybrid")
    convert(tmp_path / "hybrid", tmp_path / "back", "gpt")
    first, *others = (
        load_plan(tmp_path / name / "release/plan.json") for name in ("pruned", "hybrid", "back")
    )
    for plan in others:
        assert plan.kept["hidden"] == first.kept["hidden"]
        assert plan.kept["attention"] == plan.kept["mlp"] == first.kept["layers"]
        assert plan.source == first.source
    assert [plan.target.is_hybrid for plan in others] == [True, False]
    pruned, back = (read_tensors(str(tmp_path / name)) for name in ("pruned", "back"))
    assert_same_bytes(pruned, back)
    assert not (forms / "hybrid/release/plan.json").exists()


def test_pruning_leaves_the_form_as_it_came():
    vectors = {"attention": torch.tensor([3.0, 2, 1, 0]), "mlp": torch.tensor([3.0, 0, 2, 1])}
    for source in (LLAMA, LLAMA.by_sublayers()):
        scores = Scores(vectors=vectors, source=source, aggregation="", samples=1, seq_length=1)
        plan = make_plan(scores, source, target_arch(source, attention_layers=2, mlp_layers=2))
        assert plan.target.pattern == "*-*-"
        assert plan.target.is_hybrid == source.is_hybrid


def test_what_has_no_other_form(forms, tmp_path):
    for name, arch, to, words in (
        ("mixed", replace(LLAMA, num_layers=3, hybrid_layer_pattern="**-"), "gpt", "**- are no"),
        ("bert", BERT, "hybrid", "--hybrid-layer-pattern does not go with --bert-no-binary-head"),
        ("plain", LLAMA, "gpt", "has this form already"),
    ):
        write_model(str(tmp_path / name), arch)
        argv = ["layers", "--load", str(tmp_path / name), "--save", str(tmp_path / "new")]
        code, line = fail("tools.convert", [*argv, "--to", to])
        assert (code, words in line) == (USAGE, True), line
    assert not Path(tmp_path / "new").exists()
    argv = ["layers", "--load", str(forms / "gpt"), "--save", str(forms / "hybrid")]
    code, line = fail("tools.convert", [*argv, "--to", "hybrid"], 2)
    assert (code, "a checkpoint is there already" in line) == (USAGE, True)


def test_what_megatron_lm_computes_otherwise_is_said(tmp_path):
    write_model(str(tmp_path / "scaled"), replace(LLAMA, use_rope_scaling=True))
    argv = ["layers", "--load", str(tmp_path / "scaled"), "--save", str(tmp_path / "new")]
    (outcome,) = succeed("tools.convert", [*argv, "--to", "hybrid"])
    assert "does not scale rotary frequencies" in outcome.stderr


def test_what_points_here(forms, tmp_path):
    argv = ["export", "--load", str(forms / "hybrid"), "--hf", str(tmp_path / "hf")]
    code, line = fail("tools.convert", [*argv, "--model-type", "llama"])
    assert (code, "convert layers --to gpt" in line) == (CHECKPOINT, True)
    with pytest.raises(UserError, match="convert layers --to gpt"):
        target_arch(LLAMA.by_sublayers(), num_layers=2)
