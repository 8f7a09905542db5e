"""No option of Megatron-LM is unknown: each has an effect, has none and says so, or is refused.

``foreign/megatron-0.19.2-flags.jsonl`` is what its parser says of each option (0.19.2): spellings,
default, choices, how many values it takes (0, 1 or "*").
"""

import functools
import json
import shlex
from argparse import Namespace

import pytest

from megatron_ext.cli import parser
from megatron_ext.cli.option_rows import is_neutral, judge, options
from megatron_ext.cli.parser import REQUIRED, all_options, flag_fields
from megatron_ext.cli.programs import (
    OTHERS_IN_PRUNING,
    OTHERS_IN_TRAINING,
    PruneFlags,
    TrainFlags,
    parse_prune,
    parse_train,
)
from megatron_ext.runtime.errors import USAGE, UserError
from tests.programs import ROOT

MEGATRON = [
    json.loads(line)
    for line in (ROOT / "tests/foreign/megatron-0.19.2-flags.jsonl").read_text().splitlines()
]
BY_NAME = {name: entry for entry in MEGATRON for name in entry["options"]}
PROGRAMS = [(TrainFlags, OTHERS_IN_TRAINING), (PruneFlags, OTHERS_IN_PRUNING)]
# Options of older versions that scripts still type, and Model Optimizer's in Megatron-LM.
BESIDE = {
    "--no-async-tensor-model-parallel-allreduce",
    "--modelopt-enabled",
    "--enable-gpt-oss",
    "--qad-train-target",
    "--freeze-base-for-mtp",
    "--finetune-hf-dataset",
    "--finetune-data-split",
    "--finetune-data-files",
}
SCRIPTS = json.loads((ROOT / "tests/foreign/megatron-launch-scripts.json").read_text())
CLASSES = ("with effect", "without effect", "refused", "unknown")


def kind(name, program=TrainFlags, others=OTHERS_IN_TRAINING):
    """Return the classes of an option: one word, or none or several where the table is wrong."""
    found = ["effect"] * (name in all_options(program))
    if name in others:
        found.append("refused" if others[name].refused else "no effect")
    return found


@pytest.mark.parametrize(("program", "others"), PROGRAMS)
def test_every_option_of_megatron_is_in_one_class(program, others):
    assert len(MEGATRON) == 807
    wrong = {name: kinds for name in BY_NAME if len(kinds := kind(name, program, others)) != 1}
    assert not wrong
    for entry in MEGATRON:
        assert len({kind(name, program, others)[0] for name in entry["options"]}) == 1, entry


def test_no_option_is_listed_twice_or_made_up():
    from megatron_ext.cli.flags_without_effect import WITHOUT_EFFECT
    from megatron_ext.cli.refused_flags import REFUSED, REFUSED_IN_TRAINING

    rows = [*WITHOUT_EFFECT, *REFUSED, *REFUSED_IN_TRAINING]
    names = [name for row in rows for name in options([row])]
    assert len(names) == len(set(names))
    beside = set(names) - BY_NAME.keys()
    assert {name for name in beside if not name.startswith("--export-")} == BESIDE
    assert len({reason for reason, _ in rows}) == len(rows)


def test_options_without_a_field_take_as_many_values_as_in_megatron():
    takes = {0: 0, None: 1, "*": "*"}
    for name, other in OTHERS_IN_TRAINING.items():
        if name in BY_NAME:
            assert takes[other.nargs] == BY_NAME[name]["takes"], name


def test_megatrons_defaults_ask_for_nothing():
    for name, other in OTHERS_IN_TRAINING.items():
        default = BY_NAME.get(name, {}).get("default")
        if other.nargs is None and default not in (None, "", "<|endoftext|>"):
            assert is_neutral([str(default)], other), (name, default)
        else:
            assert not is_neutral([], other)


# Defaults of ours that are not Megatron-LM's, and why.
OTHER_DEFAULTS = {
    "--distributed-backend": "gloo without a GPU",
    "--transformer-impl": "local layers without a GPU or Transformer Engine",
    "--micro-batch-size": "required: Megatron-LM refuses a run without it too",
    "--seq-length": "required: likewise",
    "--yarn-original-max-position-embeddings": "that of megatron-core's embedding, left out there",
    "--yarn-beta-fast": "likewise",
    "--yarn-beta-slow": "likewise",
}
# Values of Megatron-LM's that are refused as no choice, or of which it takes several, and why.
OTHER_CHOICES = {
    "--position-embedding-type": "mrope and relative are not computed here",
    "--moe-router-load-balancing-type": "others depend on the layout, or are not computed here",
    "--transformer-impl": "inference_optimized is no training",
    "--attention-backend": "local is --transformer-impl local",
    "--cp-comm-type": "one for all layers; a2a+p2p needs groups that are not made here",
    "--moe-token-dispatcher-type": "flex needs DeepEP",
    "--recompute-modules": "named here, checked later there; parts of models not built here",
    "--optimizer": "muon, lion and soap are not here",
    "--fp8-recipe": "custom is code of the user",
    "--cuda-graph-impl": "full_iteration is a scope here, as up to 0.18",
    "--cuda-graph-scope": "named here, checked later there",
    "--tokenizer-type": "no tokenizer of images, of BERT, of chats; no tiktoken",
    "--ckpt-format": "one form, which any layout reads",
}


# Defaults of the flags that Megatron-LM does not have, where they are not off, 0 or nothing.
OUR_DEFAULTS = {
    "verify_integrity": True,
    "kd_loss": "forward-kl",
    "kd_loss_weight": 1.0,
    "kd_temperature": 1.0,
    "kd_jsd_beta": 0.5,
    "kd_top_k_rest": "drop",
    "kd_hidden_loss": "cosine",
    "kd_alpha": "dynamic",
    "kd_projection": "shared",
    "calibration_samples": 1024,
    "target_tolerance": 0.05,
    "budget_batch": 1,
    "importance": "activation",
    "importance_batch": "l2",
    "importance_sequence": "mean",
    "importance_neurons": "post",
    "importance_heads": "norm-first",
    "depth_importance": "block",
    "depth_block": 1,
    "prune_iterations": 1,
    "head_residual": "none",
    "gpu": "H100",
    "mfu": 0.4,
}


def plain(value):
    """Return a default as text; None, nothing and no are one, and so are 1 and 1.0."""
    value = list(value) if isinstance(value, tuple) else value
    value = float(value) if isinstance(value, int) else value
    return str(value).removeprefix("AttnBackend.").strip("[]'") if value else None


def test_defaults_and_choices_are_megatrons_or_explained():
    defaults, choices = set(), set()
    for field in [*flag_fields(TrainFlags), *flag_fields(PruneFlags)]:
        name = parser.option(field)
        if name not in BY_NAME:
            continue
        theirs, ours = BY_NAME[name], field.default
        # The default of a switch is that it was not typed.
        if theirs["takes"] != 0 and (ours is REQUIRED or plain(ours) != plain(theirs["default"])):
            defaults.add(name)
        allowed = theirs["choices"] and {plain(value) for value in theirs["choices"]}
        mine = [str(value) for value in field.metadata["choices"] or ()] or None
        if (allowed and set(allowed)) != (mine and set(mine)):
            assert not allowed or set(mine) < allowed, name
            choices.add(name)
        assert (field.default is True or field.default is False) == (theirs["takes"] == 0), name
    assert defaults == OTHER_DEFAULTS.keys()
    assert choices == OTHER_CHOICES.keys()


def test_defaults_of_our_own_flags_are_frozen():
    fields = [*flag_fields(TrainFlags), *flag_fields(PruneFlags)]
    fields = [f for f in fields if parser.option(f) not in BY_NAME and f.default is not REQUIRED]
    assert {f.name: f.default for f in fields if f.default} == OUR_DEFAULTS


def class_of(words):
    """Return what becomes of one flag and its values on the training program's command line."""
    try:
        namespace, unknown = training_parser().parse_known_args(words, Namespace(others=[]))
        judge(namespace.others, OTHERS_IN_TRAINING)
    except UserError:
        return "refused"
    if unknown:
        return "unknown"
    return "without effect" if namespace.others else "with effect"


@functools.cache
def training_parser():
    """Return what ``parser.read`` makes for each command line; it takes tens of milliseconds."""
    return parser._make_parser(TrainFlags, OTHERS_IN_TRAINING)


def flags_in(words):
    """Split a command line into lists of a flag and its values."""
    found = []
    for word in shlex.split(words):
        if word.startswith("--"):
            found.append([])
        found[-1].append(word)
    return found


def table(head, counts):
    """Return rows of counts as a Markdown table with their sum."""
    rows = [(name, [kinds.count(kind) for kind in CLASSES]) for name, kinds in counts.items()]
    lines = [f"| {head} | flags | {' | '.join(CLASSES)} |", "|---" * 6 + "|"]
    lines += [f"| {name} | {sum(n)} | {' | '.join(map(str, n))} |" for name, n in rows]
    return "\n".join(lines)


def tables():
    """Return the two tables of docs/compatibility.md."""
    words = {"effect": "with effect", "no effect": "without effect", "refused": "refused"}
    programs = {
        name: [words[kind(entry["options"][0], *pair)[0]] for entry in MEGATRON]
        for name, pair in zip(("`pretrain_distill.py`", "`prune.py`"), PROGRAMS, strict=True)
    }
    scripts = {name: [class_of(flag) for flag in flags_in(line)] for name, line in SCRIPTS.items()}
    scripts["all"] = [found for kinds in scripts.values() for found in kinds]
    return table("program", programs), table("script", scripts)


def test_no_flag_of_megatrons_launch_scripts_is_unknown():
    """The scripts are those of examples/ at NVIDIA/Megatron-LM d98e8a6, variables filled in."""
    assert len(SCRIPTS) == 11
    for name, line in SCRIPTS.items():
        unknown = [flag for flag in flags_in(line) if class_of(flag) == "unknown"]
        assert not unknown, name


def test_the_counts_in_the_documentation_are_these():
    """``python -m tests.test_megatron_options`` prints them."""
    text = (ROOT / "docs/compatibility.md").read_text()
    for expected in tables():
        assert expected in text, expected


BASE = "--micro-batch-size 2 --seq-length 16 --load x --mock-data"
TRAIN, PRUNE = f"{BASE} --train-iters 10 --lr 1e-3", f"{BASE} --save y"


def test_what_is_without_effect_is_named_once_with_its_reason(capsys):
    expected = parse_train(TRAIN.split(), 1)
    typed = f"{TRAIN} --use-flash-attn --use-flash-attn --no-rope-fusion --kv-lora-rank 8"
    assert parse_train(typed.split(), 1) == expected
    assert capsys.readouterr().err == (
        "WARNING: flags without effect: --use-flash-attn --no-rope-fusion (kernels follow from the "
        "device and --transformer-impl), --kv-lora-rank (details of --multi-latent-attention).\n"
    )


def test_megatrons_defaults_pass_in_silence(capsys):
    typed = (
        "--moe-layer-freq 1 --glu-linear-offset 0 --softmax-type vanilla --kv-lora-rank 32 "
        "--dataloader-type single --moe-layer-freq ([1]*32) --mtp-num-layers 0"
    )
    assert parse_train(f"{TRAIN} {typed}".split(), 1) == parse_train(TRAIN.split(), 1)
    assert parse_prune(f"{PRUNE} {typed}".split(), 1) == parse_prune(PRUNE.split(), 1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("parse", "base"), [(parse_train, TRAIN), (parse_prune, PRUNE)])
def test_what_would_change_the_model_is_refused_with_what_to_do(parse, base):
    with pytest.raises(UserError) as caught:
        parse(f"{base} --softmax-type off-by-one".split(), 1)
    assert str(caught.value) == (
        "--softmax-type off-by-one: only plain attention is built here; leave it out."
    )
    assert caught.value.code == USAGE
    with pytest.raises(UserError) as caught:
        parse(f"{base} --sft --spec a b --moe-layer-freq [0]*3+[1]*58 --qk-l2-norm".split(), 1)
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 flags are refused:"
    assert lines[2].startswith("  --spec a b: ")
    assert lines[3].startswith("  --moe-layer-freq [0]*3+[1]*58: all layers have experts here")


def test_a_training_flag_has_no_effect_in_pruning_unless_it_changes_scores(capsys):
    typed = (
        "--lr 1e-3 --train-iters 5 --use-distributed-optimizer --perform-rl-step --tp-comm-overlap"
    )
    assert parse_prune(f"{PRUNE} {typed}".split(), 1) == parse_prune(PRUNE.split(), 1)
    said = capsys.readouterr().err
    for name in shlex.split(typed):
        assert not name.startswith("--") or said.count(name) == 1
    with pytest.raises(UserError, match="--fp8-format hybrid: scores are measured in --bf16"):
        parse_prune(f"{PRUNE} --fp8-format hybrid".split(), 1)
    with pytest.raises(UserError, match="unknown flag --kd-loss"):
        parse_prune(f"{PRUNE} --kd-loss jsd".split(), 1)


def test_every_refusal_is_one_line_that_ends_as_a_sentence():
    for others in (OTHERS_IN_TRAINING, OTHERS_IN_PRUNING):
        for name, other in others.items():
            if not other.refused:
                continue
            with pytest.raises(UserError) as caught:
                judge([(name, [] if other.nargs == 0 else ["no such value"])], others)
            text = str(caught.value)
            assert "\n" not in text
            assert text.endswith(".")
            assert not text.endswith("..")
            # What to do instead.
            words = ("leave", "use ", "write ", "type ", "see ", "start ", "place ", "prepare ")
            assert any(w in other.reason for w in words), other.reason


def test_experts_are_split_as_other_layers():
    typed = f"{TRAIN} --tensor-model-parallel-size 2 --expert-tensor-parallel-size"
    assert parse_train(f"{typed} 2".split(), 2).parallel.expert_tensor_parallel_size == 2
    with pytest.raises(UserError, match="--expert-tensor-parallel-size 1: experts are split"):
        parse_train(f"{typed} 1".split(), 2)


if __name__ == "__main__":
    print("\n\n".join(tables()))
