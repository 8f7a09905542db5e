"""Models of sub-layers: the pattern, the model of it, and depth cut in single sub-layers."""

import json
import shlex
from argparse import Namespace
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_ext.arch import Arch, forward_flops, num_parameters
from megatron_ext.certify.trials import of_pruning
from megatron_ext.checkpoint import checkpoints, writer
from megatron_ext.checkpoint.slices import SliceReader
from megatron_ext.cli.programs import megatron_command_line, parse_prune
from megatron_ext.convert.fit import check_target, export_note
from megatron_ext.model import cuda_graphs
from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.open import restore_weights
from megatron_ext.pruning import depth
from megatron_ext.pruning.calibrate import calibrate
from megatron_ext.pruning.depth import score_sublayers
from megatron_ext.pruning.plan import Plan, load_plan
from megatron_ext.pruning.planner import make_plan
from megatron_ext.pruning.scores import Scores, lengths
from megatron_ext.pruning.scores_file import load_scores
from megatron_ext.pruning.targets import target_arch
from megatron_ext.pruning.trim import pieces, trimmed_share
from megatron_ext.rehearsal.cost import Layout, Placed, rank_parameters
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import CHECKPOINT, USAGE, UserError
from tests import test_engine_layers, test_layouts
from tests.engine import ENGINE, stand_in
from tests.models import BERT, GPT2, LLAMA, MOE, NEMOTRON, random_batch
from tests.programs import (
    LAYOUTS,
    assert_same_bytes,
    fail,
    logits_of,
    read_model,
    read_tensors,
    run_here,
    succeed,
)
from tests.ranks import run_ranks
from tests.runs import TRAIN, assert_same_curve, assert_same_run, prune, train, write_source
from tests.test_depth import CP2, PP2, TOLERANCE, TP2, batch_of, passes_of

ROPE = replace(LLAMA, use_rope_scaling=True, num_layers=2)
PLAIN = {"llama": ROPE, "gpt2": replace(GPT2, num_layers=3), "nemotron": NEMOTRON, "moe": MOE}
DOUBLE = {"params_dtype": torch.float64}


def losses_and_gradients(arch, options):
    """Return losses [b, s], logits and gradients of one step, by position in the pattern."""
    groups = platform.initialize().groups
    (model,) = build_model(arch, ModelOptions(**options), groups, seed=3)
    batch = random_batch(arch, num_samples=2, seq_length=16)
    inputs = batch["tokens"], batch["position_ids"], None
    loss = model(*inputs, labels=batch["labels"])
    loss.sum().backward()
    grads = {
        name.replace("final_layernorm", "final_norm"): p.grad
        for name, p in model.named_parameters()
    }
    with torch.no_grad():
        return loss.detach(), model(*inputs), grads


@pytest.mark.parametrize("name", PLAIN)
def test_a_pattern_of_whole_layers_computes_what_a_gpt_model_does(name):
    arch = PLAIN[name]
    (gpt,) = run_ranks(1, losses_and_gradients, arch, {})
    (hybrid,) = run_ranks(1, losses_and_gradients, arch.by_sublayers(), {})
    assert torch.equal(gpt[0], hybrid[0])
    assert torch.equal(gpt[1], hybrid[1])
    assert len(gpt[2]) == len(hybrid[2])
    for key, grad in hybrid[2].items():
        head, _, rest = key.partition(".layers.")
        if rest:
            number, _, rest = rest.partition(".")
            key = f"{head}.layers.{int(number) // 2}.{rest}"
        assert torch.equal(grad, gpt[2][key]), key


# Scores of sub-layers.


@torch.no_grad()
def naive_scores(arch):
    """Return {importance: {kind: scores}}: a sub-layer whose output matrix is zero is left out."""
    groups = platform.initialize().groups
    (model,) = build_model(arch, ModelOptions(**DOUBLE), groups, seed=7)
    model.eval()
    batch = batch_of(arch)
    mask = batch["loss_mask"].double()

    def mean(x):
        return ((x * mask).sum() / mask.sum()).item()

    def log_probabilities():
        logits = model(batch["tokens"], batch["position_ids"], None).transpose(0, 1)
        return logits[..., : arch.vocab_size].log_softmax(-1)

    stream, whole = residual_stream(model, log_probabilities)
    outputs = defaultdict(list)  # matrices that are zero together
    for layer in model.decoder.layers:
        if hasattr(layer.self_attention, "linear_proj"):
            outputs["attention"].append([layer.self_attention.linear_proj])
        if hasattr(layer.mlp, "linear_fc2"):
            outputs["mlp"].append([layer.mlp.linear_fc2])
        if hasattr(layer.mlp, "experts"):
            modules = layer.mlp.named_modules()
            outputs["moe"].append([m for name, m in modules if name.endswith("linear_fc2")])
    scores = {"block": {}, "loss": {}, "kl": {}}
    symbols = {"attention": "*", "mlp": "-", "moe": "E"}
    for kind, sublayers in outputs.items():
        places = [i for i, symbol in enumerate(arch.pattern) if symbol == symbols[kind]]
        scores["block"][kind] = [
            mean(1 - torch.cosine_similarity(*stream[i : i + 2], dim=-1)) for i in places
        ]
        for matrices in sublayers:
            parameters = [p for matrix in matrices for p in matrix.parameters()]
            before = [p.clone() for p in parameters]
            for p in parameters:
                p.zero_()
            without = log_probabilities()
            loss = -without.gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1)
            kl = (whole.exp() * (whole - without)).sum(-1)
            scores["loss"].setdefault(kind, []).append(mean(loss))
            scores["kl"].setdefault(kind, []).append(mean(kl))
            for p, x in zip(parameters, before, strict=True):
                p.copy_(x)
    return scores


def residual_stream(model, run):
    """Return the stream before each sub-layer and behind the last, [b, s, H], and what runs."""
    states = []
    last = "final_norm" if hasattr(model.decoder, "final_norm") else "final_layernorm"
    norms = [getattr(model.decoder, last)]
    for layer in model.decoder.layers:
        norms += [layer.input_layernorm] if hasattr(layer.self_attention, "linear_proj") else []
        has_mlp = hasattr(layer.mlp, "linear_fc2") or hasattr(layer.mlp, "experts")
        norms += [layer.pre_mlp_layernorm] if has_mlp else []

    def keep(_, args):
        states.append(args[0].clone().transpose(0, 1))

    handles = [norm.register_forward_pre_hook(keep) for norm in norms]
    found = run()
    for handle in handles:
        handle.remove()
    return states, found


def score(arch, layout, options):
    passes = passes_of(arch, layout, options)
    found = {name: score_sublayers(passes, name) for name in ("block", "loss", "kl")}
    return found, calibrate(passes)


MIXED = replace(LLAMA, num_layers=7, hybrid_layer_pattern="*-**--*")
# A plain MLP first, as DeepSeek's models have it; a mixture without attention before it.
EXPERTS = replace(MOE, num_layers=6, hybrid_layer_pattern="*-*EE*")
SCORED = {"llama": LLAMA, "gpt2": GPT2, "mixed": MIXED, "experts": EXPERTS, "moe": MOE}
SPLIT = {
    "serial": (1, {}, {}),
    "TP2+SP": (2, TP2, {"sequence_parallel": True}),
    "PP2": (2, PP2, {}),
    "PP2xVPP2": (
        2,
        PP2 | {"virtual_pipeline_model_parallel_size": 2},
        {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True},
    ),
    "CP2": (2, CP2, {}),
    "DP2": (2, {}, {}),
}


@pytest.fixture(scope="module")
def naive():
    return {name: run_ranks(1, naive_scores, arch)[0] for name, arch in SCORED.items()}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("llama", x) for x in SPLIT),
        ("gpt2", "serial"),
        *(("mixed", x) for x in SPLIT),
        *(("experts", x) for x in SPLIT if "PP2" not in x),
        ("moe", "serial"),
        ("moe", "DP2"),
    ],
)
def test_a_sublayer_scores_as_one_whose_output_is_zero(name, layout, naive):
    arch, (world_size, sizes, options) = SCORED[name], SPLIT[layout]
    if arch.is_hybrid and "PP2" in layout:
        stages = "Ett|tt|tt|tL" if "VPP2" in layout else "Ettt|ttttL"
        options = options | {"pipeline_model_parallel_layout": stages}
    ranks = run_ranks(world_size, score, arch, sizes, options)
    for importance, vectors in ranks[0][0].items():
        for kind, expected in naive[name][importance].items():
            found = vectors[kind].tolist()
            assert found == pytest.approx(expected, rel=1e-6, abs=TOLERANCE[importance])
            assert all(torch.equal(vectors[kind], x[0][importance][kind]) for x in ranks)
    if arch.is_hybrid:  # in the passes of the other axes too
        calibrated = ranks[0][1]
        assert calibrated.keys() == lengths(arch).keys()
        assert "layers" not in calibrated
        for kind, expected in naive[name]["block"].items():
            assert calibrated[kind].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


# prune.py.

SUBLAYERS = "--target-attention-layers 3 --target-mlp-layers 2"
SMALLER = f"{SUBLAYERS} --target-hidden-size 40 --target-ffn-hidden-size 48"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("llama"), LLAMA)


@pytest.fixture(scope="module")
def sublayers(llama, tmp_path_factory):
    """LLAMA with fewer sub-layers and nothing else changed."""
    return prune(tmp_path_factory.mktemp("sublayers"), llama, SUBLAYERS)


@pytest.fixture(scope="module")
def smaller(llama, tmp_path_factory):
    return prune(tmp_path_factory.mktemp("smaller"), llama, SMALLER)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "TP1"])
def test_no_layout_changes_scores_plan_or_bytes(layout, llama, smaller, tmp_path):
    assert_same_run(prune(tmp_path, llama, SMALLER, LAYOUTS[layout]), smaller)


FEWER = "--target-moe-layers 1 --target-num-experts 4 --target-moe-ffn-hidden-size 8"


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """A model with plain MLPs and mixtures, and what one rank makes of it."""
    folder = tmp_path_factory.mktemp("mixtures")
    source = write_source(folder, EXPERTS)
    return source, prune(folder, source, FEWER)


@pytest.mark.parametrize("layout", ["TP2+SP", "PP2", "EP2"])
def test_no_layout_changes_a_pattern_with_experts(layout, mixtures, tmp_path):
    source, serial = mixtures
    layouts = LAYOUTS | {"EP2": (2, "--expert-model-parallel-size 2")}
    assert_same_run(prune(tmp_path, source, FEWER, layouts[layout]), serial)
    assert sorted(load_plan(serial["plan"]).target.pattern) == sorted("*-*E*")


def test_a_plan_says_which_sublayers_stay(sublayers):
    scores, plan = load_scores(sublayers["scores"]), load_plan(sublayers["plan"])
    assert scores.depth == "block, sub-layers"
    for kind, count in (("attention", 3), ("mlp", 2)):
        best = scores.vectors[kind].argsort(descending=True)[:count].sort().values
        assert plan.kept[kind] == tuple(best.tolist())
    assert "layers" not in plan.kept
    pattern = "".join(
        symbol
        for layer in range(LLAMA.num_layers)
        for kind, symbol in (("attention", "*"), ("mlp", "-"))
        if layer in plan.kept[kind]
    )
    arch = checkpoints.read(sublayers["save"]).arch
    assert arch == plan.target
    assert (arch.hybrid_layer_pattern, arch.num_layers) == (pattern, 5)
    assert json.loads((Path(sublayers["plan"])).read_text())["attention"] == list(
        plan.kept["attention"]
    )
    assert {f"heads.{i}" for i in plan.kept["attention"]} <= plan.kept.keys()
    assert {f"ffn.{i}" for i in plan.kept["mlp"]} <= plan.kept.keys()


def test_names_on_disk_are_those_of_a_hybrid_model(sublayers):
    arch = checkpoints.read(sublayers["save"]).arch
    heads, bodies = {"*": "self_attention.", "-": "mlp."}, []
    for key in read_tensors(sublayers["save"]):
        if key.startswith("decoder.layers."):
            number, _, rest = key.removeprefix("decoder.layers.").partition(".")
            assert rest.startswith(heads[arch.pattern[int(number)]]), key
            bodies.append(int(number))
    assert set(bodies) == set(range(5))
    assert "decoder.final_norm.weight" in read_tensors(sublayers["save"])


def masked(source, plan):
    """Return logits of the source, and without the sub-layers that the plan leaves out."""
    model = read_model(source["load"])
    gone = [
        layer
        for kind in ("attention", "mlp")
        for number, block in enumerate(depth.sublayers(plan.source, kind))
        if number not in plan.kept[kind]
        for layer in block
    ]
    whole = logits_of(model, plan.source)
    with depth.skipped([model], gone):
        return whole, logits_of(model, plan.source)


def logits_on_disk(folder, arch):
    return logits_of(read_model(folder), arch)


def test_masked_is_trimmed(llama, sublayers, tmp_path):
    hybrid = llama | {"load": sublayers["save"]}
    again = prune(tmp_path, hybrid, "--target-mlp-layers 1")
    for before, after in ((llama, sublayers), (hybrid, again)):
        plan = load_plan(after["plan"])
        ((whole, without),) = run_ranks(1, masked, before, plan)
        (trimmed,) = run_ranks(1, logits_on_disk, after["save"], plan.target)
        torch.testing.assert_close(trimmed, without, rtol=1e-12, atol=1e-12)
        assert (whole - without).abs().max() > 0.1


@pytest.fixture(scope="module")
def again(llama, sublayers, tmp_path_factory):
    """A pruned model, pruned again in depth and width."""
    folder, source = tmp_path_factory.mktemp("again"), llama | {"load": sublayers["save"]}
    return source, prune(folder, source, AGAIN)


AGAIN = "--target-attention-layers 2 --target-ffn-hidden-size 60 --target-num-attention-heads 2"
UNEVEN = (2, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ett|tttL")


@pytest.mark.parametrize("layout", [LAYOUTS["TP2+SP"], UNEVEN, LAYOUTS["CP2"]])
def test_a_model_of_sublayers_is_pruned_as_any_other(layout, again, tmp_path):
    source, pruned = again
    assert_same_run(prune(tmp_path, source, AGAIN, layout), pruned)
    arch = checkpoints.read(pruned["save"]).arch
    assert (arch.attention_layers, arch.mlp_layers, arch.ffn_hidden_size) == (2, 2, 60)


def test_pruning_to_the_same_sizes_returns_the_same_bytes(again, tmp_path):
    source, _ = again
    same = prune(tmp_path, source, "", LAYOUTS["TP2"])
    assert_same_bytes(read_tensors(same["save"]), read_tensors(source["load"]))
    assert checkpoints.read(same["save"]).arch == checkpoints.read(source["load"]).arch


# Training.

EIGHT = replace(LLAMA, num_layers=8, hybrid_layer_pattern="*-**--*-")
TRAINED = {
    "alone": (EIGHT, None),
    "gpt2": (replace(GPT2, num_layers=4, hybrid_layer_pattern="*--*"), None),
    "beside a GPTModel": (replace(EIGHT, hidden_size=32, ffn_hidden_size=48), LLAMA),
    "experts": (EXPERTS, None),
}


@pytest.fixture(scope="module")
def gradients():
    return {
        name: run_ranks(1, test_layouts.gradients_of_one_step, arch, {}, {}, teacher)[0]
        for name, (arch, teacher) in TRAINED.items()
    }


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("alone", x) for x in ("TP2", "TP2+SP", "PP2", "PP2xVPP2", "CP2", "DP2", "TP2xPP2")),
        ("gpt2", "TP2+SP"),
        ("gpt2", "PP2xVPP2"),
        *(("beside a GPTModel", x) for x in ("TP2+SP", "PP2", "PP2xVPP2")),
        *(("experts", x) for x in ("TP2+SP", "PP2", "EP2")),
    ],
)
def test_loss_and_gradients_equal_serial(name, layout, gradients):
    (arch, teacher), (losses, expected) = TRAINED[name], gradients[name]
    layouts = test_layouts.LAYOUTS | test_layouts.EXPERT_LAYOUTS
    world_size, sizes, options = layouts[layout]
    found = run_ranks(world_size, test_layouts.gradients_of_one_step, arch, sizes, options, teacher)
    for rank_losses, _ in found:
        assert rank_losses == pytest.approx(losses, rel=1e-7)
    tolerance = 1e-8 if teacher is None else 1e-11
    shards = [x for _, each in found for x in each.items()]
    test_layouts.assert_gradients_equal(expected, shards, tolerance)


RECOMPUTED = {
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "some": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 3,
    },
}


@pytest.mark.parametrize("how", RECOMPUTED)
def test_recomputing_changes_no_gradient(how, gradients):
    options = {"recompute": RECOMPUTED[how]}
    found = run_ranks(1, test_layouts.gradients_of_one_step, EIGHT, {}, options)
    losses, expected = gradients["alone"]
    assert found[0][0] == pytest.approx(losses, rel=1e-7)
    test_layouts.assert_gradients_equal(expected, list(found[0][1].items()), 1e-8)


TRAIN_LAYOUTS = {
    "TP2+SP": LAYOUTS["TP2+SP"],
    "PP2": UNEVEN,
    "CP2": LAYOUTS["CP2"],
    "DP2": (2, "--use-distributed-optimizer"),
}


@pytest.fixture(scope="module")
def runs(llama, sublayers, tmp_path_factory):
    """Return the student's flags and what is logged on one rank, by kind of run."""
    folder, load = tmp_path_factory.mktemp("runs"), ["--load", sublayers["save"]]
    pattern = checkpoints.read(sublayers["save"]).arch.pattern
    mlp, attention = pattern.rindex("-"), pattern.rindex("*")
    pairs = f"mlp:3:{mlp},attention:3:{attention},embedding"
    teacher = ["--teacher-load", llama["load"], "--kd-hidden-states", pairs]
    words = {"alone": load, "distilled": [*load, *teacher]}
    return {
        name: (each, train(llama, folder / name, *each), folder / name)
        for name, each in words.items()
    }


@pytest.mark.parametrize("layout", TRAIN_LAYOUTS)
@pytest.mark.parametrize("kind", ["alone", "distilled"])
def test_training_is_the_same_under_every_layout(kind, layout, runs, llama, tmp_path):
    words, expected, _ = runs[kind]
    if (kind, layout) == ("distilled", "PP2"):  # stages follow the pairs
        found = train(llama, tmp_path / "run", *words, layout=LAYOUTS["PP2"])
    else:
        found = train(llama, tmp_path / "run", *words, layout=TRAIN_LAYOUTS[layout])
    assert_same_curve(found, expected)
    assert any("kd" in name for line in found.values() for name in line) == (kind == "distilled")


@pytest.mark.parametrize("layouts", [("DP2", "PP2"), ("PP2", "TP2+SP")])
def test_a_run_is_resumed_under_another_layout(layouts, runs, llama, tmp_path):
    words, expected, _ = runs["alone"]
    first, second = (TRAIN_LAYOUTS[name] for name in layouts)
    optimizer = ["--use-distributed-optimizer"]
    train(llama, tmp_path / "run", *words, *optimizer, "--train-iters", "2", layout=first)
    resume = ["--load", str(tmp_path / "run"), *optimizer, "--override-opt-param-scheduler"]
    found = train(llama, tmp_path / "run", *resume, layout=second)
    assert_same_curve(found, expected)


def test_a_new_model_of_sublayers(llama, tmp_path):
    words = shlex.split(megatron_command_line(EIGHT))
    assert "--num-layers" not in words
    assert "--hybrid-layer-pattern" in words
    train(llama, tmp_path / "new", *words)
    assert checkpoints.read(str(tmp_path / "new")).arch == EIGHT


# Transformer Engine's kind of layers.

ENGINE_ARCH = replace(
    NEMOTRON,
    num_layers=6,
    hybrid_layer_pattern="*--*M*",
    mamba_num_heads=4,
    mamba_head_dim=8,
    mamba_num_groups=2,
    mamba_state_dim=6,
)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(1, ({}, {})), (2, test_engine_layers.TP2)],
    ids=["serial", "TP2+SP"],
)
def test_scores_see_the_norms_inside_linear_layers(world_size, layout):
    both, score_model = test_engine_layers.both, test_engine_layers.score_model
    for local, engine in run_ranks(world_size, both, score_model, ENGINE_ARCH, *layout):
        for scores, others in zip(local, engine, strict=True):
            assert scores.keys() == others.keys() == lengths(ENGINE_ARCH).keys()
            assert all(torch.equal(scores[key], others[key]) for key in scores)


@pytest.mark.parametrize(("written", "read"), [({}, ENGINE), (ENGINE, {}), (ENGINE, ENGINE)])
def test_either_kind_of_layers_reads_the_other(written, read, tmp_path):
    args = (str(tmp_path), ENGINE_ARCH, written, read)
    ((before, after, _),) = run_ranks(1, test_engine_layers.save_and_load, *args)
    assert torch.equal(before, after)


def trim_and_load(folder):
    """Return logits of both kinds of layers of what was trimmed, and the objects that it lacks."""
    stand_in()
    groups = platform.initialize().groups
    chunks = build_model(NEMOTRON, ModelOptions(**ENGINE), groups, seed=5)
    test_engine_layers.save(f"{folder}/whole", NEMOTRON, chunks)
    plan = make_plan(
        Scores(
            vectors={"attention": torch.arange(4.0), "mlp": -torch.arange(4.0)},
            source=NEMOTRON,
            aggregation="",
            samples=1,
            seq_length=1,
        ),
        NEMOTRON,
        target_arch(NEMOTRON, attention_layers=3, mlp_layers=2),
    )
    share = trimmed_share(SliceReader(f"{folder}/whole/release"), plan, 0, 1)
    content = {"model": share, "args": Namespace(**plan.target.to_args())}
    writer.save(f"{folder}/trimmed", checkpoints.RELEASE, content, files={})
    results = []
    for options in ({}, ENGINE):
        others = build_model(plan.target, ModelOptions(**options), groups, seed=6)
        restore_weights(others, checkpoints.read(f"{folder}/trimmed"))
        results.append(test_engine_layers.logits(plan.target, others))
    wanted = others[0].sharded_state_dict()
    objects = {x.unique_key for x in wanted.values() if isinstance(x, ShardedObject)}
    return results, objects - SliceReader(f"{folder}/trimmed/release").objects, plan.target.pattern


def test_extra_states_go_with_their_sublayers(tmp_path):
    ((results, absent, pattern),) = run_ranks(1, trim_and_load, str(tmp_path))
    assert torch.equal(*results)
    assert pattern == "-*-**"
    assert not absent


# Other ways to score, distil and look.

WAYS = {
    "kl": "--depth-importance kl",
    "iterations": "--prune-iterations 2 --target-ffn-hidden-size 40",
}


@pytest.mark.parametrize("way", WAYS)
def test_no_layout_changes_other_ways(way, llama, tmp_path):
    argv = f"{SUBLAYERS} {WAYS[way]}"
    found = [
        prune(tmp_path / name, llama, argv, LAYOUTS[name]) for name in ("TP1", "TP2xPP2", "DP2")
    ]
    for other in found[1:]:
        assert_same_run(other, found[0])


def test_weights_score_sublayers(llama, again, tmp_path):
    hybrid, _ = again
    for name, source in (("gpt", llama), ("hybrid", hybrid)):
        argv = "--target-mlp-layers 1 --importance magnitude"
        one, two = (prune(tmp_path / name / x, source, argv, LAYOUTS[x]) for x in ("TP1", "TP2"))
        assert_same_run(two, one)
        vectors, tensors = load_scores(one["scores"]).vectors, read_tensors(source["load"])
        for kind, parts in {"attention": "self_attention", "mlp": "mlp"}.items():
            totals = defaultdict(float)
            for key, x in tensors.items():
                if f".{parts}." in key:
                    number = key.removeprefix("decoder.layers.").partition(".")[0]
                    stack = {int(number): x} if number.isdigit() else dict(enumerate(x))
                    for layer, each in stack.items():
                        totals[layer] += each.double().square().sum().item()
            expected = [totals[layer] for layer in sorted(totals)]
            assert vectors[kind].square().tolist() == pytest.approx(expected, rel=1e-5)


def test_chance_scores_sublayers(llama, tmp_path):
    files = prune(tmp_path, llama, f"{SUBLAYERS} --importance random")
    plan = load_plan(files["plan"])
    assert (len(plan.kept["attention"]), len(plan.kept["mlp"])) == (3, 2)


def test_fused_output_distils_alike(runs, llama, tmp_path):
    words, expected, _ = runs["distilled"]
    fused = train(llama, tmp_path / "fused", *words, "--kd-fused-output", layout=LAYOUTS["TP2"])
    assert_same_curve(fused, expected)


def test_tools_look_at_it(llama, sublayers):
    pattern = checkpoints.read(sublayers["save"]).arch.pattern
    code, out, _ = run_here(["tools/inspect_checkpoint.py", "--load", sublayers["save"]])
    assert not code
    assert pattern in out
    assert "attention kept, from 0" in out
    data = " ".join(llama["data"]).replace("--split 80,15,5", "").split()
    argv = ["--load", sublayers["save"], "--teacher-load", llama["load"], *data]
    one, two = (succeed("tools.evaluate", argv, ranks)[0].stdout for ranks in (1, 2))
    assert "loss" in one
    assert one == two


# What is counted, what is refused.


def with_pattern(pattern):
    return replace(LLAMA, num_layers=len(pattern), hybrid_layer_pattern=pattern)


@pytest.mark.parametrize("counted", [num_parameters, lambda arch: forward_flops(arch, 16)])
def test_each_sublayer_counts_once(counted):
    attention = counted(with_pattern("**-")) - counted(with_pattern("*-"))
    mlp = counted(with_pattern("*--")) - counted(with_pattern("*-"))
    assert counted(LLAMA) == counted(with_pattern("*-")) + 3 * (attention + mlp)
    assert counted(MIXED) == counted(with_pattern("*-")) + 3 * attention + 2 * mlp
    assert attention != mlp


def test_stages_hold_all_parameters():
    layout = Layout(world_size=2, pipeline_model_parallel_size=2, seq_length=16)
    model = Placed(MIXED, (3, 4))
    assert sum(sum(rank_parameters(model, layout, rank)) for rank in (0, 1)) == num_parameters(
        MIXED
    )
    assert [model.on(rank, 2).pattern for rank in (0, 1)] == ["*-*", "*--*"]
    assert rank_parameters(model, layout, 0) != rank_parameters(
        Placed(with_pattern("-*-**-*"), (3, 4)), layout, 0
    )


def test_what_saved_args_say():
    saved = MIXED.to_args() | {"hybrid_layer_pattern": "*-*|*--*"}
    assert Arch.from_args(saved) == MIXED
    assert Arch.from_args(LLAMA.to_args()).hybrid_layer_pattern is None
    assert LLAMA.by_sublayers().by_layers() == LLAMA
    for pattern, words in (
        ("*G-*", r"'G' is not built here, only \* \(attention\)"),
        ("*-/*", "'/' is not built here"),
        ("*-|*", r"leave out \|, and cut pipeline stages with --pipeline-model-parallel-layout"),
        ("", "at least one sub-layer"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(LLAMA, hybrid_layer_pattern=pattern)
    with pytest.raises(ValueError, match="3 sub-layers, num_layers is 4"):
        replace(LLAMA, hybrid_layer_pattern="*-*")
    with pytest.raises(ValueError, match="--hybrid-layer-pattern does not go with --bert-no-b"):
        BERT.by_sublayers()
    with pytest.raises(ValueError, match="an E needs --num-experts"):
        replace(LLAMA, hybrid_layer_pattern="*-*E")
    with pytest.raises(ValueError, match="an E goes with --num-experts"):
        replace(MOE, hybrid_layer_pattern="*-*-")
    # Sizes of experts go with the last mixture.
    assert replace(MOE, hybrid_layer_pattern="*-*E").with_pattern("*-*-").num_experts is None


REFUSED = {
    "--target-num-layers 3 --target-mlp-layers 2": ["whole layers or sub-layers, not both"],
    "--target-attention-layers 5": ["--target-attention-layers 5", "1 to the checkpoint's 4"],
    f"{SUBLAYERS} --depth-block 2": ["--depth-block 2", "one by one"],
}


@pytest.mark.parametrize("targets", REFUSED)
def test_what_is_refused(targets, llama, tmp_path):
    argv = ["--load", llama["load"], *llama["data"], "--calibration-samples", "8"]
    code, line = fail("prune", [*argv, *targets.split(), "--save", str(tmp_path / "x")])
    assert code == USAGE
    assert all(word in line for word in REFUSED[targets]), line
    assert "\n" not in line


def test_whole_layers_of_sublayers_are_refused():
    with pytest.raises(UserError, match=r"sub-layers, .*; use --target-attention-layers"):
        target_arch(MIXED, num_layers=5)
    with pytest.raises(UserError, match="whole layers are removed; use --target-num-layers"):
        target_arch(BERT, attention_layers=3)
    assert target_arch(MOE, attention_layers=3, moe_layers=2).pattern == "*E*E*"
    with pytest.raises(UserError, match=r"--target-mlp-layers 1: the checkpoint's model has none"):
        target_arch(MOE, mlp_layers=1)


def test_export_is_refused(sublayers, tmp_path):
    argv = ["export", "--load", sublayers["save"], "--hf", str(tmp_path / "hf")]
    code, line = fail("tools.convert", [*argv, "--model-type", "llama"])
    assert code == CHECKPOINT
    assert "no Hugging Face family" in line
    assert "--target-num-layers" in line
    assert not (tmp_path / "hf").exists()


def test_a_model_that_came_from_elsewhere_is_told():
    origin, cut = {"model_type": "llama"}, target_arch(LLAMA, attention_layers=3)
    check_target(cut, LLAMA, origin)
    assert "cannot be exported, unless" in export_note(cut, LLAMA, origin)
    assert export_note(cut, LLAMA, {}) is None
    assert export_note(target_arch(LLAMA, num_layers=3), LLAMA, origin) is None


def test_hidden_states_of_a_sublayer_that_is_not_there(llama, sublayers, tmp_path):
    arch = checkpoints.read(sublayers["save"]).arch
    number = arch.pattern.index("*")
    argv = ["--load", sublayers["save"], "--teacher-load", llama["load"], *llama["data"], *TRAIN]
    pairs = ["--kd-hidden-states", f"mlp:1:{number}"]
    code, line = fail("pretrain_distill", [*argv, *pairs, "--save", str(tmp_path / "x")])
    assert code == USAGE
    assert f"layer {number} of the student is no mlp; its sub-layers are {arch.pattern}" in line


def test_a_plan_of_sublayers_that_cannot_be(sublayers):
    values = json.loads(Path(sublayers["plan"]).read_text())
    for change, words in (
        ({"attention": [0, 1]}, "attention keeps 2 units, the target has 3"),
        ({"mlp": [0, 9]}, "mlp names unit 9 of 4"),
        ({"layers": [0, 1]}, "unknown entry 'layers'"),
        (
            {"target": values["target"] | {"hybrid_layer_pattern": "--***"}},
            "the sub-layers that it keeps are",
        ),
    ):
        with pytest.raises(UserError, match=words):
            Plan.from_json(json.dumps(values | change))


def test_whole_layers_that_are_left_are_a_gpt_model():
    vectors = {"attention": torch.tensor([3.0, 2, 1, 0]), "mlp": torch.tensor([3.0, 0, 2, 1])}
    scores = Scores(vectors=vectors, source=LLAMA, aggregation="", samples=1, seq_length=1)
    plan = make_plan(scores, LLAMA, target_arch(LLAMA, attention_layers=2, mlp_layers=2))
    assert (plan.kept["attention"], plan.kept["mlp"]) == ((0, 1), (0, 2))
    assert plan.target == replace(LLAMA, num_layers=2)
    assert Plan.from_json(plan.to_json()) == plan
    places = {
        (piece.weight.key.split(".")[2], piece.new_layer): piece.layer
        for piece in pieces(plan)
        if piece.layer is not None
    }
    expected = {("self_attention", 0): 0, ("self_attention", 1): 1, ("mlp", 0): 0, ("mlp", 1): 2}
    assert places == expected


def test_what_else_is_refused(llama, sublayers):
    argv = shlex.split(f"--load {llama['load']} {' '.join(llama['data'])} --save x")
    flags = parse_prune(argv, 1)
    for source, target in ((MIXED, MIXED), (LLAMA, with_pattern("*-**-"))):
        with pytest.raises(UserError, match="has no form in small here"):
            of_pruning(flags, source, [target], 1, 4)
    graphs = cuda_graphs.Graphs(cuda_graph_impl="local")
    for student, teacher in ((MIXED, None), (LLAMA, MIXED)):
        with pytest.raises(UserError, match="not been tried with a model of sub-layers"):
            cuda_graphs.check_models(graphs, student, teacher)


@pytest.mark.parametrize("layout", ["", "--tensor-model-parallel-size 2 --world-size 2"])
def test_a_dry_run(layout, llama, sublayers):
    argv = ["prune.py", "--load", llama["load"], *llama["data"], "--calibration-samples", "8"]
    code, out, _ = run_here(
        [*argv, *SUBLAYERS.split(), "--scores", "s", "--dry-run", *layout.split()]
    )
    assert (code, out.splitlines()[-1]) == (0, "OK")
    assert "5 sub-layers" in out
    assert "for 2 forward passes" in out
    argv = ["pretrain_distill.py", "--load", sublayers["save"], *llama["data"], *TRAIN]
    code, out, _ = run_here([*argv, "--dry-run", *layout.split()])
    assert (code, out.splitlines()[-1]) == (0, "OK")
