"""Hidden-state losses: a naive reference for values and gradients, and every layout against serial.

In float64, where what differs is a mistake.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_ext.checkpoint.checkpoints import sharded_tensors
from megatron_ext.distillation.hidden import HiddenLosses
from megatron_ext.distillation.losses import vocab_parallel_kl
from megatron_ext.distillation.model import Distillation, DistillationModel
from megatron_ext.distillation.pairs import HiddenStates, Pair, parse_pairs
from megatron_ext.model.build import build_model, model_state_dict
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.layers import shard_positions
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import CHECKPOINT, USAGE
from megatron_ext.training.step import StepShape, train_step, wrap
from tests.models import GPT2, LLAMA, random_batch
from tests.programs import LAYOUTS as PROGRAM_LAYOUTS
from tests.programs import (
    assert_same_bytes,
    data_flags,
    fail,
    read_metrics,
    read_tensors,
    run_program,
    succeed,
    write_corpus,
    write_model,
)
from tests.ranks import run_ranks
from tests.test_layouts import LAYOUTS

NARROW = replace(LLAMA, hidden_size=32, ffn_hidden_size=48)
NARROW_GPT2 = replace(GPT2, hidden_size=24)
# On the first, the middle and the last stages.
PAIRS = "embedding,0:0,mlp:1:1,attention:2:2,2:2,3:last"
LASTS = (3, 3)
KEPT = tuple(range(0, 48, 3)) + tuple(range(1, 48, 3))
CASES = {
    "cosine, one map": (NARROW, LLAMA, {}),
    "mse, a map for each": (NARROW, LLAMA, {"loss": "mse", "projection": "per-pair"}),
    "equal widths": (replace(LLAMA, ffn_hidden_size=48), LLAMA, {}),
    "from a plan": (NARROW, LLAMA, {"kept_channels": tuple(sorted(KEPT))}),
    "LayerNorm, tied": (NARROW_GPT2, GPT2, {"loss": "mse"}),
    "logits only": (NARROW, LLAMA, None),
}
NUM_SAMPLES, SEQ_LENGTH, ALPHA = 4, 16, 0.7


def models(case, groups, options, dtype=torch.float64):
    student, teacher, settings = CASES[case]
    states = None if settings is None else HiddenStates(pairs=parse_pairs(PAIRS, LASTS), **settings)
    distillation = Distillation(hidden_states=states, vocab_size=student.vocab_size)
    options = ModelOptions(params_dtype=dtype, **options)
    students = build_model(student, options, groups, seed=7)
    teachers = build_model(teacher, options, groups, seed=8)
    modules = [
        DistillationModel(s, t, distillation, groups.tp)
        for s, t in zip(students, teachers, strict=True)
    ]
    return students, modules


def trained(
    case,
    layout,
    options,
    micro_batch_size=1,
    dtype=torch.float64,
    distributed=False,
    overlap=False,
    late=False,
):
    """Return the losses of each step and this rank's {(key, offset): trained tensor}."""
    groups = platform.initialize(**layout).groups
    students, modules = models(case, groups, options, dtype)
    parts = [module.hidden for module in modules if module.hidden is not None]
    hidden = HiddenLosses(parts, groups, ALPHA)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=overlap,
        overlap_param_gather=late,
    )
    wrapped = wrap(modules, ddp, groups, hidden=hidden)
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        params_dtype=dtype,
        clip_grad=0.0,
        use_distributed_optimizer=distributed,
        overlap_param_gather=late,
    )
    optimizer = get_megatron_optimizer(
        config, wrapped.model, use_gloo_process_groups=False, pg_collection=groups
    )
    whole = random_batch(CASES[case][0], num_samples=NUM_SAMPLES, seq_length=SEQ_LENGTH)
    positions = shard_positions(SEQ_LENGTH // groups.cp.size(), groups.cp, groups.cp.rank())
    mine = {
        key: x.chunk(groups.dp.size())[groups.dp.rank()][:, positions] for key, x in whole.items()
    }
    split = {key: x.split(micro_batch_size) for key, x in mine.items()}
    batches = [dict(zip(split, parts, strict=True)) for parts in zip(*split.values(), strict=True)]
    shape = StepShape(
        num_microbatches=len(batches), micro_batch_size=micro_batch_size, seq_length=SEQ_LENGTH
    )
    history = []
    for _ in range(2):
        parts = [iter(batches) for _ in modules]
        losses, apply = train_step(wrapped, optimizer, parts, shape, {"kd loss": 1.0})
        history.append({**losses, "grad norm": apply()[1]})
    for chunk in wrapped.model if late else ():
        chunk.disable_forward_pre_hook()  # waits for the parameters
    tensors = {}
    for shard in sharded_tensors(model_state_dict(students) | hidden.sharded_state()):
        tensors[shard.key, tuple(shard.global_offset)] = shard.data.detach().clone()
    return history, tensors


@pytest.fixture(scope="module")
def serial():
    return {case: run_ranks(1, trained, case, {}, {})[0] for case in CASES}


def whole_tensors(tensors):
    """Return {key: {layer or None: tensor}} of a serial run."""
    return {
        key: {offset: tensor for (name, offset), tensor in tensors.items() if name == key}
        for key in {key for key, _ in tensors}
    }


def assert_same(ours, theirs, case, rtol=1e-6, atol=1e-9):
    (history, tensors), (expected, reference) = ours, theirs
    for step, other in zip(history, expected, strict=True):
        # What is reported is summed in float32; the tensors below are float64 throughout.
        assert step == pytest.approx(other, rel=1e-6), case
    whole = whole_tensors(reference)
    for (key, offset), tensor in tensors.items():
        places = whole[key]
        axes = len(offset) - tensor.ndim
        # Of a gated MLP there are two: the half that this one begins in.
        whole_offset, full = next(
            (o, x)
            for o, x in places.items()
            if o[:axes] == offset[:axes] and 0 <= offset[axes] - o[axes] < len(x)
        )
        start = [a - b for a, b in zip(offset[axes:], whole_offset[axes:], strict=True)]
        index = tuple(slice(a, a + n) for a, n in zip(start, tensor.shape, strict=True))
        torch.testing.assert_close(
            tensor, full[index], rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}"
        )


# Two cases under every layout; the others differ from them in what a rank does by itself.
WHERE = [
    (case, layout)
    for case in CASES
    for layout in LAYOUTS
    if layout in ("TP2+SP", "PP2xVPP2")
    or (layout != "TP1" and case in ("cosine, one map", "LayerNorm, tied", "logits only"))
]


@pytest.mark.parametrize(("case", "layout"), WHERE)
def test_two_steps_are_the_same_under_every_layout(case, layout, serial):
    world_size, sizes, options = LAYOUTS[layout]
    for rank in run_ranks(world_size, trained, case, sizes, options):
        assert_same(rank, serial[case], case)


def test_the_size_of_micro_batches_changes_nothing(serial):
    case = "cosine, one map"
    assert_same(run_ranks(1, trained, case, {}, {}, 4)[0], serial[case], case)


@pytest.mark.parametrize(
    ("case", "layout", "method", "num_layers"),
    [
        ("cosine, one map", "serial", "uniform", 1),
        ("cosine, one map", "TP2+SP", "uniform", 2),
        ("cosine, one map", "PP2", "uniform", 1),
        ("mse, a map for each", "PP2xVPP2", "uniform", 1),
        ("mse, a map for each", "TP2xPP2", "block", 1),
        ("LayerNorm, tied", "DP2", "block", 2),
    ],
)
def test_layers_that_run_again_in_backward_change_nothing(case, layout, method, num_layers, serial):
    """Under PP a layer runs again when the teacher is some micro-batches ahead."""
    world_size, parallel, options = {"serial": (1, {}, {}), **LAYOUTS}[layout]
    recompute = {"granularity": "full", "method": method, "num_layers": num_layers}
    options = options | {"recompute": {f"recompute_{k}": v for k, v in recompute.items()}}
    settings = 1, torch.float64, False, layout == "DP2"  # the shared map's gradient comes in parts
    for ours in run_ranks(world_size, trained, case, parallel, options, *settings):
        assert_same(ours, serial[case], case)


def test_the_distributed_optimizer_changes_nothing():
    """The shared map's gradients are added between stages that each hold a share of them."""
    case, pp2 = "cosine, one map", {"pipeline_model_parallel_size": 2}
    plain, split = (
        run_ranks(4, trained, case, pp2, {}, 1, torch.float32, distributed)
        for distributed in (False, True)
    )
    for ours, theirs in zip(split, plain, strict=True):
        assert_same(ours, theirs, case, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["cosine, one map", "mse, a map for each"])
def test_parameters_that_arrive_late_change_nothing(case):
    """Regression: nothing waited for the maps, and the second step ended in an assertion."""
    for ours, theirs in zip(
        run_ranks(2, trained, case, {}, {}, 1, torch.float32, True, True, True),
        run_ranks(2, trained, case, {}, {}, 1, torch.float32, True, True),
        strict=True,
    ):
        assert_same(ours, theirs, case, rtol=0, atol=0)


# Naive reference.


def filter_none(output):
    """Return attention's output and the bias that megatron-core adds behind it, if there is one."""
    return [x for x in output if x is not None]


def states_of(model, store):
    """Capture every state that ``PAIRS`` compares, with hooks of this test."""
    model.embedding.register_forward_hook(lambda _, a, y: store.update(embedding=y))
    for number, layer in enumerate(model.decoder.layers):
        layer.register_forward_hook(lambda _, a, y, n=number: store.update({f"block{n}": y[0]}))
        layer.self_attention.register_forward_hook(
            lambda _, a, y, n=number: store.update({f"attention{n}": sum(filter_none(y))})
        )
        layer.pre_mlp_layernorm.register_forward_pre_hook(
            lambda _, a, n=number: store.update({f"mlp{n}": a[0]})
        )


def naive_norm(x, is_rms, epsilon):
    x = x if is_rms else x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()


def naive_and_ours(case):
    """Return losses and gradients of plain autograd, and what training makes of one step."""
    groups = platform.initialize().groups
    student, teacher, settings = CASES[case]
    (ours,), (module,) = models(case, groups, {})
    maps = {name: p.detach().clone().requires_grad_() for name, p in module.hidden.maps.items()}
    options = ModelOptions(params_dtype=torch.float64)
    (plain,), (frozen,) = (
        build_model(arch, options, groups, seed=seed) for arch, seed in ((student, 7), (teacher, 8))
    )
    seen, seen_of_teacher = {}, {}
    states_of(plain, seen)
    states_of(frozen, seen_of_teacher)
    batch = random_batch(student, num_samples=NUM_SAMPLES, seq_length=SEQ_LENGTH)
    inputs = (batch["tokens"], batch["position_ids"], None)
    with torch.no_grad():
        teacher_logits = frozen(*inputs)
    mask = batch["loss_mask"].T.double()
    kl = vocab_parallel_kl(plain(*inputs), teacher_logits, vocab_size=student.vocab_size) * mask
    total = 0.0
    is_rms, epsilon = student.normalization == "RMSNorm", student.norm_epsilon
    for pair in parse_pairs(PAIRS, LASTS):
        names = [
            "embedding" if pair.kind == "embedding" else f"{pair.kind}{layer}"
            for layer in (pair.student, pair.teacher)
        ]
        s = naive_norm(seen[names[0]], is_rms, epsilon)
        t = naive_norm(seen_of_teacher[names[1]], is_rms, epsilon)
        if maps:
            name = "shared" if "shared" in maps else str(pair).replace(":", "-")
            s = s @ maps[name].T
        if settings.get("loss") == "mse":
            loss = (s - t).square().mean(dim=-1)
        else:
            loss = 1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
        total = total + (loss * mask).sum()
    count = mask.sum()
    ((kl.sum() + ALPHA * total) / count).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()} | {
        f"map {name}": p.grad for name, p in maps.items()
    }
    hidden = HiddenLosses([module.hidden], groups, ALPHA)
    wrapped = wrap([module], DistributedDataParallelConfig(), groups, hidden=hidden)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="sgd", lr=0.1, params_dtype=torch.float64, clip_grad=0.0),
        wrapped.model,
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    shape = StepShape(num_microbatches=1, micro_batch_size=NUM_SAMPLES, seq_length=SEQ_LENGTH)
    losses, _ = train_step(wrapped, optimizer, [iter([batch])], shape, {"kd loss": 1.0})
    got = {name: p.main_grad for name, p in ours.named_parameters()} | {
        f"map {name}": p.main_grad for name, p in module.hidden.maps.items()
    }
    values = [losses["kd loss"], losses["hidden loss"]]
    return (values, got), ([float(kl.sum() / count), float(total / count)], expected)


@pytest.mark.parametrize("case", [case for case in CASES if case != "logits only"])
def test_values_and_gradients_equal_plain_autograd(case):
    (values, gradients), (expected, reference) = run_ranks(1, naive_and_ours, case)[0]
    assert values == pytest.approx(expected, rel=1e-7)  # what is reported is summed in float32
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        # megatron-core divides all by the number of tokens, through a float32 reciprocal.
        # Position embeddings are float32 in megatron-core, whatever the model.
        is_double = gradient.dtype == torch.float64
        torch.testing.assert_close(
            gradient,
            reference[name],
            rtol=1e-7 if is_double else 1e-5,
            atol=1e-11 if is_double else 1e-7,
            msg=lambda m, name=name: f"{name}: {m}",
        )


# As a user runs it.

FLAGS = (
    "--global-batch-size 4 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --train-iters 6 "
    "--save-interval 2 --log-interval 1 --eval-iters 1 --eval-interval 3"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    corpus = data_flags(LLAMA, write_corpus(folder / "corpus", LLAMA.vocab_size))
    teacher, pruned = str(folder / "teacher"), str(folder / "pruned")
    write_model(teacher, LLAMA)
    sizes = ["--target-hidden-size", "32", "--target-ffn-hidden-size", "48"]
    sizes += ["--calibration-samples", "8", "--load", teacher, "--save", pruned]
    succeed("prune", [*corpus, *sizes])
    return [*corpus, *FLAGS.split(), "--load", pruned, "--teacher-load", teacher], folder


@pytest.mark.parametrize("layout", ["TP1", "PP2xVPP2"])
def test_a_stopped_run_goes_on_bit_for_bit(layout, place, tmp_path):
    """With alpha and the map, which begins at the channels that the plan kept."""
    argv, _ = place
    world_size, flags = PROGRAM_LAYOUTS[layout]
    argv = [*argv, *flags.split(), "--kd-hidden-states", PAIRS]
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    succeed("pretrain_distill", [*argv, "--save", whole], world_size)
    stopped = run_program(
        "pretrain_distill", [*argv, "--save", broken, "--exit-interval", "4"], world_size
    )
    assert {outcome.code for outcome in stopped} == {75}
    succeed("pretrain_distill", [*argv, "--save", broken], world_size)
    assert read_metrics(broken) == read_metrics(whole)
    tensors = read_tensors(whole)
    assert_same_bytes(tensors, read_tensors(broken))
    assert tensors["distillation.projection.shared"].shape == (48, 32)
    lines = [line for line in read_metrics(whole) if "alpha" in line]
    for before, after in itertools.pairwise(lines):
        assert after["alpha"] == pytest.approx(before["kd loss"] / before["hidden loss"])
    assert "hidden loss validation" in read_metrics(whole)[0]


def test_no_layout_changes_a_loss(place, tmp_path):
    argv, _ = place
    runs = {}
    for layout in ("TP1", "TP2+SP", "PP2", "CP2"):
        world_size, flags = PROGRAM_LAYOUTS[layout]
        save = str(tmp_path / layout)
        more = [*flags.split(), "--kd-hidden-states", PAIRS, "--save", save]
        succeed("pretrain_distill", [*argv, *more], world_size)
        runs[layout] = read_metrics(save)
    for layout, metrics in runs.items():
        for ours, theirs in zip(metrics, runs["TP1"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), layout


def pairs_flags(pairs):
    return ["--kd-hidden-states", pairs] if pairs else []


@pytest.mark.parametrize(("before", "now"), [("", "3:3"), ("", "embedding,3:3")])
def test_maps_cannot_come_later(before, now, place, tmp_path):
    """Regression: a table of tensors, and no word of what to do."""
    argv, _ = place
    argv = [*argv, "--save", str(tmp_path)]
    run_program("pretrain_distill", [*argv, *pairs_flags(before), "--exit-interval", "2"])
    code, message = fail("pretrain_distill", [*argv, *pairs_flags(now)])
    assert code == CHECKPOINT
    assert "--kd-hidden-states" in message
    assert "--load and --finetune" in message


@pytest.mark.parametrize("before", ["", "3:3"])
def test_states_of_equal_widths_may_come_later(before, place, tmp_path):
    """Regression: a run whose losses have no maps could not go on: a KeyError."""
    argv, folder = place
    argv = [*argv, "--load", str(folder / "teacher"), "--save", str(tmp_path)]
    run_program("pretrain_distill", [*argv, *pairs_flags(before), "--exit-interval", "2"])
    succeed("pretrain_distill", [*argv, *pairs_flags("3:3")])
    steps = [line for line in read_metrics(str(tmp_path)) if "grad-norm" in line]
    assert [line["iteration"] for line in steps if "hidden loss" in line] == (
        [1, 2, 3, 4, 5, 6] if before else [3, 4, 5, 6]
    )


def test_the_map_is_no_weight_of_the_model(place, tmp_path):
    """A run without hidden states takes the weights of one with them."""
    argv, _ = place
    save, other = str(tmp_path / "save"), str(tmp_path / "other")
    more = ["--kd-hidden-states", "3:3", "--kd-alpha", "0.5", "--save", save]
    succeed("pretrain_distill", [*argv, *more])
    assert {line.get("alpha", 0.5) for line in read_metrics(save)} == {0.5}
    argv = argv[: argv.index("--load")]
    succeed("pretrain_distill", [*argv, "--load", save, "--finetune", "--save", other])
    assert not any("distillation" in name for name in read_tensors(other))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--kd-hidden-states 4:0", ["4:0", "teacher has layers 0 to 3"]),
        ("--kd-hidden-states 0:9", ["0:9", "student has layers 0 to 3"]),
        ("--kd-hidden-states 3-3", ["'3-3' is none of", "teacher:student"]),
        ("--kd-hidden-states embedding,embedding", ["twice"]),
        ("--kd-hidden-states 3:3 --kd-alpha 0", ["--kd-alpha 0", "dynamic"]),
        ("--kd-alpha 0.5", ["--kd-alpha 0.5 needs --kd-hidden-states"]),
        (
            "--kd-hidden-states 3:0 --pipeline-model-parallel-size 2 "
            "--pipeline-model-parallel-layout Ett|ttL",
            ["3:0", "different pipeline stages"],
        ),
        (
            "--kd-hidden-states 3:3 --recompute-granularity full --recompute-method uniform "
            "--recompute-num-layers 1 --bf16 --fp8-format hybrid",
            ["full and --fp8-format has not been tried"],
        ),
    ],
)
def test_what_is_refused(flags, words, place, tmp_path):
    argv, _ = place
    flags = flags.split()
    code, message = fail("pretrain_distill", [*argv, *flags, "--save", str(tmp_path / "save")], 2)
    assert code == USAGE, message
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_the_grammar():
    lasts = (31, 15)
    assert parse_pairs("29:13, embedding,mlp:3:1,attention:4:2,block:5:5,29:last", lasts) == (
        Pair("block", 29, 13),
        Pair("embedding", None, None),
        Pair("mlp", 3, 1),
        Pair("attention", 4, 2),
        Pair("block", 5, 5),
        Pair("block", 29, 15),
    )
    for text, named in (
        ("block:1:0,embedding,mlp:3:1", "1:0,embedding,mlp:3:1"),
        ("last:last,attention:last:2", "31:15,attention:31:2"),
    ):
        assert ",".join(map(str, parse_pairs(text, lasts))) == named
    with pytest.raises(ValueError, match="'last:15' is there twice"):
        parse_pairs("31:15,last:15", lasts)
