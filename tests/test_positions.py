"""Models whose layers differ in size: counted, pruned to and from, built, trained, distilled."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ext.arch import Arch, forward_flops, num_parameters
from megatron_ext.arch.rows import read_values
from megatron_ext.checkpoint import checkpoints, writer
from megatron_ext.checkpoint.slices import SliceReader
from megatron_ext.cli.fit import check_layout
from megatron_ext.cli.megatron_flags import Parallel
from megatron_ext.convert.fit import export_note
from megatron_ext.model import fp8
from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.fp8 import Fp8
from megatron_ext.pruning.budget import Use, kv_bytes
from megatron_ext.pruning.calibrate import calibrate
from megatron_ext.pruning.plan import Plan, load_plan
from megatron_ext.pruning.planner import make_plan, summary
from megatron_ext.pruning.scores import lengths
from megatron_ext.pruning.scores_file import load_scores
from megatron_ext.pruning.search import auto_space
from megatron_ext.pruning.targets import read_targets, target_arch
from megatron_ext.pruning.trim import pieces, trim_tensor, trimmed_share
from megatron_ext.rehearsal.cost import Layout, Placed, layer_bytes, rank_parameters
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import CHECKPOINT, USAGE, UserError
from tests import test_engine_layers, test_layouts
from tests.engine import ENGINE
from tests.models import LLAMA, MOE
from tests.programs import (
    LAYOUTS,
    assert_same_bytes,
    fail,
    logits_of,
    read_tensors,
    run_here,
    write_model,
)
from tests.ranks import run_ranks
from tests.runs import TRAIN, assert_same_curve, assert_same_run, prune, train, write_source
from tests.test_depth import CP2, PP2, TP2, batch_of, passes_of
from tests.test_scores import random_scores
from tests.test_trim import cut, load_model, naive_trim

BASE = replace(LLAMA, num_attention_heads=8, num_query_groups=4, kv_channels=8)
HEADS, GROUPS, FFN = (8, 4, 4, 2), (4, 4, 2, 2), (64, 40, 80, 24)
LISTS = {"num_attention_heads": HEADS, "num_query_groups": GROUPS, "ffn_hidden_size": FFN}
VARIED = BASE.with_sizes(LISTS)
# Of VARIED, fewer again: one size for all layers, and lists.
FEWER = {"ffn_hidden_size": (32, 40, 16, 24), "num_attention_heads": (4, 4, 2, 2)}


# Sizes.


def test_each_layer_counts_with_its_own_sizes():
    hidden, channels = BASE.hidden_size, BASE.kv_channels
    layers = 0
    flops = 2 * BASE.padded_vocab_size * hidden
    for heads, groups, ffn in zip(HEADS, GROUPS, FFN, strict=True):
        matrices = (heads + 2 * groups) * channels * hidden + heads * channels * hidden
        matrices += 3 * ffn * hidden
        layers += matrices + 2 * hidden
        flops += 2 * matrices + 2 * heads * channels * 16
    assert num_parameters(VARIED) == 2 * BASE.padded_vocab_size * hidden + layers + hidden
    assert forward_flops(VARIED, 16) == flops
    ((built, shapes),) = run_ranks(1, parameters_of_a_model, VARIED)
    assert built == num_parameters(VARIED)
    assert [shapes[f"decoder.layers.{2 * i + 1}.mlp.linear_fc2.weight"] for i in range(4)] == [
        (hidden, ffn) for ffn in FFN
    ]


def parameters_of_a_model(arch):
    groups = platform.initialize().groups
    (model,) = build_model(arch, ModelOptions(), groups)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return sum(p.numel() for p in model.parameters()), shapes


def test_equal_models_are_equal():
    assert VARIED.is_hybrid
    assert VARIED.pattern == "*-*-*-*-"
    assert dict(VARIED.by_layer) == LISTS
    assert Arch.from_args(VARIED.to_args()) == VARIED
    as_lists = json.loads(json.dumps(VARIED.by_layer))
    again = Arch.from_args({**VARIED.to_args(), "by_layer": as_lists})
    assert again == VARIED
    assert hash(again) == hash(VARIED)
    assert BASE.with_sizes({"ffn_hidden_size": (64,) * 4}) == replace(BASE, ffn_hidden_size=64)
    assert not BASE.with_sizes({"ffn_hidden_size": (64,) * 4}).is_hybrid
    uniform = BASE.by_sublayers()
    assert replace(uniform, by_layer=(("ffn_hidden_size", (80,) * 4),)) == uniform


def test_a_sublayer_has_its_sizes_everywhere():
    layer = VARIED.at("attention", 2)
    assert (layer.num_attention_heads, layer.num_query_groups) == (4, 2)
    assert not layer.by_layer
    assert VARIED.at("mlp", 3).ffn_hidden_size == 24
    assert VARIED.at(None, None) is VARIED
    assert BASE.at("mlp", 3) is BASE
    part = VARIED.part((1, 2, 3, 7))
    assert part.pattern == "-*--"
    assert part.values("ffn_hidden_size") == (64, 40, 24)
    assert (part.num_attention_heads, part.num_query_groups) == (4, 4)


@pytest.mark.parametrize(
    ("by_layer", "words"),
    [
        ({"ffn_hidden_size": (80, 64)}, "ffn_hidden_size has 2 values for 4 mlp sub-layers"),
        ({"ffn_hidden_size": (64, 80, 80, 80)}, "begins with 64, ffn_hidden_size is 80"),
        ({"hidden_size": (48, 40, 40, 40)}, "hidden_size cannot differ"),
        ({"num_attention_heads": (8, 8, 6, 8)}, "6 is not a multiple of --num-query-groups 4"),
        ({"ffn_hidden_size": (80, 0, 80, 80)}, "--ffn-hidden-size must be >= 1: 0"),
    ],
)
def test_sizes_that_cannot_be(by_layer, words):
    with pytest.raises(ValueError, match=words):
        replace(BASE.by_sublayers(), by_layer=tuple(by_layer.items()))


def test_a_gpt_model_has_no_layers_that_differ():
    with pytest.raises(ValueError, match="need a hybrid_layer_pattern"):
        replace(BASE, by_layer=(("ffn_hidden_size", (80, 80, 80, 64)),))
    assert not VARIED.has_whole_layers
    with pytest.raises(ValueError, match="its layers differ in ffn_hidden_size, num_attention"):
        VARIED.by_layers()


def test_each_stage_holds_its_own():
    layout = Layout(world_size=2, pipeline_model_parallel_size=2, seq_length=16)
    model = Placed(VARIED, (3, 5))
    held = [sum(rank_parameters(model, layout, rank)) for rank in (0, 1)]
    assert sum(held) == num_parameters(VARIED)
    assert model.on(0, 2).values("num_attention_heads") == (8, 4)
    assert model.on(1, 2).values("ffn_hidden_size") == FFN[1:]
    serial = Layout(world_size=1, seq_length=16)
    each = [
        BASE.by_sublayers().with_sizes({n: (v[i],) * 4 for n, v in LISTS.items()}) for i in range(4)
    ]
    mean = sum(layer_bytes(arch, serial) for arch in each) / 4
    assert layer_bytes(VARIED, serial) == pytest.approx(mean)


def test_text_of_sizes():
    assert read_values("64") == 64
    assert read_values("64,2x48, 3x32") == (64, 48, 48, 32, 32, 32)
    for text in ("", "64,", "x48", "2*48", "-3"):
        with pytest.raises(ValueError, match="is no whole number"):
            read_values(text)


# Targets and plans.


def test_lists_are_targets(tmp_path):
    assert target_arch(BASE, **LISTS) == VARIED
    groups = target_arch(BASE, num_query_groups=(4, 2, 4, 1))
    assert groups.values("num_attention_heads") == (8, 4, 8, 2)
    assert target_arch(BASE, ffn_hidden_size=[64] * 4) == target_arch(BASE, ffn_hidden_size=64)
    assert target_arch(VARIED) == VARIED
    uniform = target_arch(VARIED, ffn_hidden_size=24)
    assert dict(uniform.by_layer).keys() == {"num_attention_heads", "num_query_groups"}
    file = tmp_path / "targets.yaml"
    file.write_text("a: {ffn_hidden_size: [64, 40, 80, 24]}\nb: {ffn_hidden_size: 40}\n")
    targets = read_targets(file, BASE)
    assert targets["a"].values("ffn_hidden_size") == FFN
    assert targets["b"] == replace(BASE, ffn_hidden_size=40)
    # The second value is that of the second MLP that stays, whichever it is.
    deeper = target_arch(BASE, mlp_layers=2, ffn_hidden_size=(64, 32))
    assert (deeper.pattern, deeper.values("ffn_hidden_size")) == ("*-*-**", (64, 32))


@pytest.mark.parametrize(
    ("source", "sizes", "words"),
    [
        (BASE, {"ffn_hidden_size": (64, 40)}, "2 values for 4 mlp sub-layers that stay"),
        (BASE, {"ffn_hidden_size": (64, 40, 81, 24)}, "81: choose from 1 to the checkpoint's 80"),
        (VARIED, {"ffn_hidden_size": (64, 41, 80, 24)}, "41: the mlp sub-layer 1 .* has 40"),
        (VARIED, {"ffn_hidden_size": 32}, "32: choose from 1 to the checkpoint's 24"),
        (BASE, {"num_attention_heads": (8, 8, 6, 8)}, "6: each of 4 query groups"),
        (
            BASE,
            {"num_layers": 3, "ffn_hidden_size": (64, 40, 80)},
            "--target-num-layers 3 and --target-ffn-hidden-size with a value for each layer",
        ),
        (VARIED, {"mlp_layers": 3}, "differ in ffn_hidden_size, and which of them stay"),
    ],
)
def test_targets_that_cannot_be(source, sizes, words):
    with pytest.raises(UserError, match=words) as error:
        target_arch(source, **sizes)
    assert error.value.code == USAGE
    assert "\n" not in str(error.value)


def test_depth_of_what_differs_goes_with_one_size():
    target = target_arch(VARIED, mlp_layers=3, ffn_hidden_size=24)
    assert (target.pattern, target.values("ffn_hidden_size")) == ("*-*-*-*", (24,))
    plan = make_plan(random_scores(VARIED), VARIED, target)
    assert plan.target.values("num_attention_heads") == HEADS
    assert [len(plan.kept[f"ffn.{i}"]) for i in plan.kept["mlp"]] == [24] * 3


def test_a_plan_keeps_as_many_as_each_layer_has():
    scores = random_scores(BASE)
    plan = make_plan(scores, BASE, VARIED)
    for layer, (heads, ffn) in enumerate(zip(HEADS, FFN, strict=True)):
        best = scores.vectors[f"ffn.{layer}"].argsort(descending=True)[:ffn].sort().values
        assert plan.kept[f"ffn.{layer}"] == tuple(best.tolist())
        assert len(plan.kept[f"heads.{layer}"]) == heads
    assert Plan.from_json(plan.to_json()) == plan
    assert "24-80" in summary(plan)
    values = json.loads(plan.to_json())
    values["ffn"]["1"] = values["ffn"]["1"][:-1]
    with pytest.raises(UserError, match=r"ffn\.1 keeps 39 units, the target has 40"):
        Plan.from_json(json.dumps(values))


def test_a_plan_of_fewer_layers_gives_sizes_by_the_order_of_those_that_stay():
    scores = random_scores(BASE)
    scores.vectors["mlp"] = torch.tensor([0.0, 3, 1, 2])
    scores.vectors["attention"] = torch.arange(4.0)
    plan = make_plan(scores, BASE, target_arch(BASE, mlp_layers=2, ffn_hidden_size=(64, 32)))
    assert plan.kept["mlp"] == (1, 3)
    assert (len(plan.kept["ffn.1"]), len(plan.kept["ffn.3"])) == (64, 32)
    assert plan.target.pattern == "**-**-"


@pytest.mark.parametrize("plan_of", [(BASE, LISTS), (VARIED, FEWER)], ids=["to", "from"])
def test_every_weight_is_cut_as_by_naive_slices(plan_of):
    source, sizes = plan_of
    plan = make_plan(random_scores(source), source, target_arch(source, **sizes))
    for piece in pieces(plan):
        before, after = (
            arch.at(piece.weight.kind, layer)
            for arch, layer in ((plan.source, piece.layer), (plan.target, piece.new_layer))
        )
        x = torch.randn(dims_of(piece, before))
        trimmed = trim_tensor(x, piece.dims, plan, piece.layer)
        assert trimmed.shape == dims_of(piece, after)
        expected = naive_trim(x, piece.dims, replace(plan, source=before), piece.layer)
        assert torch.equal(trimmed, expected), piece


def dims_of(piece, arch):
    gates, channels = 2, arch.kv_channels
    heads, groups = arch.num_attention_heads, arch.num_query_groups
    sizes = {
        "vocab": arch.padded_vocab_size,
        "hidden": arch.hidden_size,
        "ffn": arch.ffn_hidden_size,
        "fc1": gates * arch.ffn_hidden_size,
        "heads": heads * channels,
        "qkv": (heads + 2 * groups) * channels,
    }
    return tuple(sizes[dim] for dim in piece.dims)


# Scores.


def score(arch, layout, options):
    return calibrate(passes_of(arch, layout, options))


def naive_scores(arch):
    """Return sqrt of the sum over samples of the squared mean of |x|, by hooks of its own."""
    groups = platform.initialize().groups
    (model,) = build_model(arch, ModelOptions(params_dtype=torch.float64), groups, seed=7)
    model.eval()
    seen, batch = {}, batch_of(arch)
    for name, module in model.named_modules():
        if name.endswith(("linear_fc2", "linear_proj")):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0]})
            )
    with torch.no_grad():
        model(batch["tokens"], batch["position_ids"], None)
    mask = batch["loss_mask"].double().unsqueeze(-1)
    found = {}
    for name, x in seen.items():
        x, layer = x.transpose(0, 1), int(name.split(".")[2])
        if name.endswith("linear_proj"):
            x = x.unflatten(-1, (-1, arch.kv_channels)).norm(dim=-1)
        means = (x.abs() * mask).sum(1) / mask.sum(1)
        kind = "ffn" if name.endswith("linear_fc2") else "heads"
        number = arch.pattern[:layer].count(arch.pattern[layer])
        found[f"{kind}.{number}"] = means.square().sum(0).sqrt()
    return found


MIXED = replace(BASE, num_layers=7, hybrid_layer_pattern="*-**--*").with_sizes(
    {"num_attention_heads": HEADS, "num_query_groups": GROUPS, "ffn_hidden_size": (64, 40, 80)}
)


@pytest.fixture(scope="module")
def naive():
    return run_ranks(1, naive_scores, MIXED)[0]


SPLIT = {
    "serial": (1, {}, {}),
    "TP2+SP": (2, TP2, {"sequence_parallel": True}),
    "PP2": (2, PP2, {"pipeline_model_parallel_layout": "Ettt|ttttL"}),
    "CP2": (2, CP2, {}),
    "DP2": (2, {}, {}),
}


@pytest.mark.parametrize("layout", SPLIT)
def test_scores_of_layers_that_differ(layout, naive):
    world_size, sizes, options = SPLIT[layout]
    ranks = run_ranks(world_size, score, MIXED, sizes, options)
    for found in ranks:
        assert {name: len(vector) for name, vector in found.items()} == lengths(MIXED)
        for name, expected in naive.items():
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-7)
    assert naive.keys() == {name for name in lengths(MIXED) if "." in name}


# Models.


def masked_and_trimmed(root, source, plans):
    """Return (logits of the trimmed model, of the source with the same units switched off)."""
    results, groups = [], platform.initialize().groups
    for plan in plans:
        (model,) = load_model(source, plan.source, groups)
        save_share(f"{root}/target", source, plan)
        for layers, axis, weight, width in (
            (plan.source.layers_of("attention"), "heads", "self_attention.linear_proj", 8),
            (plan.source.layers_of("mlp"), "ffn", "mlp.linear_fc2", 1),
        ):
            for number, layer in enumerate(layers):
                parameter = model.decoder.layers[layer].get_submodule(weight).weight
                cut(parameter, 1, plan.kept[f"{axis}.{number}"], width)
        (target,) = load_model(f"{root}/target", plan.target, groups)
        results.append((logits_of(target, plan.target), logits_of(model, plan.source)))
    return results


def save_share(root, source, plan):
    share = trimmed_share(SliceReader(f"{source}/release"), plan, 0, 1)
    args = Namespace(**plan.target.to_args())
    writer.save(root, "release", {"model": share, "args": args}, files={})


@pytest.mark.parametrize("plan_of", [(BASE, LISTS), (VARIED, FEWER)], ids=["to", "from"])
def test_trimming_equals_masking(plan_of, tmp_path):
    source, sizes = plan_of
    write_model(f"{tmp_path}/source", source)
    scores = random_scores(source)
    alone = [{"ffn_hidden_size": sizes["ffn_hidden_size"]}, {"num_query_groups": (2, 2, 1, 2)}]
    targets = [target_arch(source, **each) for each in (sizes, *alone)]
    plans = [make_plan(scores, source, target) for target in targets]
    args = str(tmp_path), f"{tmp_path}/source", plans
    for trimmed, masked in run_ranks(1, masked_and_trimmed, *args)[0]:
        torch.testing.assert_close(trimmed, masked, rtol=1e-11, atol=1e-11)


def permuted_logits(root, plan):
    save_share(f"{root}/permuted", f"{root}/source", plan)
    groups, arch = platform.initialize().groups, plan.source
    models = [load_model(f"{root}/{name}", arch, groups) for name in ("source", "permuted")]
    return [logits_of(model, arch) for (model,) in models]


def test_the_order_of_units_changes_nothing(tmp_path):
    write_model(f"{tmp_path}/source", VARIED)
    everything, generator = make_plan(None, VARIED, VARIED), torch.Generator().manual_seed(2)
    kept = dict(everything.kept)
    for name, units in everything.kept.items():
        axis, *layer = name.split(".")
        if axis == "ffn":
            kept[name] = tuple(torch.randperm(len(units), generator=generator).tolist())
        if axis == "heads":  # within their groups
            size = VARIED.at("attention", int(layer[0]))
            each = size.num_attention_heads // size.num_query_groups
            kept[name] = tuple(
                g * each + h for g in range(size.num_query_groups) for h in reversed(range(each))
            )
    assert all(kept[name] != everything.kept[name] for name in ("ffn.1", "heads.2"))
    ((before, after),) = run_ranks(
        1, permuted_logits, str(tmp_path), replace(everything, kept=kept)
    )
    torch.testing.assert_close(after, before, rtol=1e-11, atol=1e-11)


TRAINED = {
    "alone": (VARIED, None),
    "beside a GPTModel": (replace(VARIED, hidden_size=32), BASE),
    "beside another": (MIXED, VARIED),
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
        *(("alone", x) for x in ("TP2+SP", "PP2", "PP2xVPP2", "CP2", "DP2", "TP2xPP2")),
        *(("beside a GPTModel", x) for x in ("TP2+SP", "PP2", "PP2xVPP2")),
        ("beside another", "TP2+SP"),
    ],
)
def test_loss_and_gradients_equal_serial(name, layout, gradients):
    (arch, teacher), (losses, expected) = TRAINED[name], gradients[name]
    world_size, sizes, options = test_layouts.LAYOUTS[layout]
    found = run_ranks(world_size, test_layouts.gradients_of_one_step, arch, sizes, options, teacher)
    for rank_losses, _ in found:
        assert rank_losses == pytest.approx(losses, rel=1e-7)
    shards = [x for _, each in found for x in each.items()]
    test_layouts.assert_gradients_equal(expected, shards, 1e-8 if teacher is None else 1e-11)


def test_every_layer_must_divide():
    with pytest.raises(UserError, match="3 does not divide --num-attention-heads, 8"):
        check_layout(VARIED, Parallel(tensor_model_parallel_size=3), seq_length=16)
    odd = VARIED.with_sizes({"ffn_hidden_size": (64, 41, 80, 24)})
    with pytest.raises(UserError, match=r"2 does not divide --ffn-hidden-size, 41; .* allows 1"):
        check_layout(odd, Parallel(tensor_model_parallel_size=2), seq_length=16)
    groups = VARIED.with_sizes({"num_query_groups": (4, 4, 2, 1)})
    with pytest.raises(UserError, match=r"2 does not divide .* 1; this model allows 1"):
        check_layout(groups, Parallel(tensor_model_parallel_size=2), seq_length=16)
    check_layout(VARIED, Parallel(tensor_model_parallel_size=2), seq_length=16)


@pytest.mark.parametrize(("written", "read"), [({}, ENGINE), (ENGINE, {})])
def test_either_kind_of_layers_reads_the_other(written, read, tmp_path):
    args = str(tmp_path), VARIED, written, read
    ((before, after, _),) = run_ranks(1, test_engine_layers.save_and_load, *args)
    assert torch.equal(before, after)


def test_fp8_asks_every_layer():
    wide = replace(VARIED, hidden_size=64, kv_channels=16)
    layout = {"has_weights": True, "tokens": 128}
    with pytest.raises(UserError, match="--ffn-hidden-size 40 must be a multiple of 16"):
        fp8.check_models(Fp8(fp8_format="hybrid"), wide, None, Parallel(), **layout)
    fits = wide.with_sizes({"ffn_hidden_size": (64, 48, 80, 32)})
    fp8.check_models(Fp8(fp8_format="hybrid"), fits, None, Parallel(), **layout)


def test_a_cache_of_keys_has_the_groups_of_each_layer():
    use = Use(context=10, batch=3)
    assert kv_bytes(VARIED, use) == 2 * sum(GROUPS) * BASE.kv_channels * 2 * 30
    space = auto_space(VARIED)
    assert "hidden_size" in space
    assert "ffn_hidden_size" not in space


# The programs.

TARGETS = (
    "--target-ffn-hidden-size 64,40,80,24 --target-num-attention-heads 8,2x4,2 "
    "--target-num-query-groups 4,4,2,2"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("base"), BASE)


@pytest.fixture(scope="module")
def varied(base, tmp_path_factory):
    return prune(tmp_path_factory.mktemp("varied"), base, TARGETS)


@pytest.fixture(scope="module")
def again(base, varied, tmp_path_factory):
    """What was pruned, pruned again: other lists, channels, heads."""
    source = base | {"load": varied["save"]}
    return source, prune(tmp_path_factory.mktemp("again"), source, AGAIN)


AGAIN = "--target-ffn-hidden-size 32,40,16,24 --target-num-attention-heads 4,4,2,2 "
AGAIN += "--target-hidden-size 40"


@pytest.mark.parametrize("layout", ["TP2+SP", "PP2", "DP2"])
def test_no_layout_changes_scores_plan_or_bytes(layout, base, varied, again, tmp_path):
    assert checkpoints.read(varied["save"]).arch == VARIED
    assert_same_run(prune(tmp_path / "to", base, TARGETS, LAYOUTS[layout]), varied)
    source, pruned = again
    assert checkpoints.read(pruned["save"]).arch.values("ffn_hidden_size") == (32, 40, 16, 24)
    assert_same_run(prune(tmp_path / "from", source, AGAIN, LAYOUTS[layout]), pruned)


def test_lists_of_one_size_are_that_size(base, tmp_path):
    one = prune(tmp_path / "one", base, "--target-ffn-hidden-size 64")
    four = prune(tmp_path / "four", base, "--target-ffn-hidden-size 3x64,64")
    assert_same_bytes(read_tensors(one["save"]), read_tensors(four["save"]))
    assert Path(one["plan"]).read_bytes() == Path(four["plan"]).read_bytes()
    assert checkpoints.read(one["save"]).args == checkpoints.read(four["save"]).args
    assert not checkpoints.read(four["save"]).arch.is_hybrid


def test_pruning_to_the_same_sizes_returns_the_same_bytes(base, varied, tmp_path):
    same = prune(tmp_path, base | {"load": varied["save"]}, "", LAYOUTS["TP2"])
    assert_same_bytes(read_tensors(same["save"]), read_tensors(varied["save"]))
    assert checkpoints.read(same["save"]).arch == VARIED


def test_weights_score_layers_that_differ(base, varied, tmp_path):
    source, argv = base | {"load": varied["save"]}, f"{AGAIN} --importance magnitude"
    one, two = (prune(tmp_path / x, source, argv, LAYOUTS[x]) for x in ("TP1", "TP2"))
    assert_same_run(two, one)
    vectors, tensors = load_scores(one["scores"]).vectors, read_tensors(varied["save"])
    for number, ffn in enumerate(FFN):
        name = f"decoder.layers.{2 * number + 1}.mlp.linear_fc"
        up = tensors[f"{name}1.weight"].double().square().view(2, ffn, -1).sum((0, 2))
        total = up + tensors[f"{name}2.weight"].double().square().sum(0)
        torch.testing.assert_close(
            vectors[f"ffn.{number}"].double(), total.sqrt(), rtol=1e-5, atol=0
        )


def test_heads_are_folded_where_some_go(base, tmp_path):
    argv = "--target-num-attention-heads 8,4,4,8 --head-residual laco"
    folded, plain = (
        prune(tmp_path / name, base, words)
        for name, words in (("folded", argv), ("plain", argv.split(" --head")[0]))
    )
    plan = load_plan(folded["plan"])
    assert {layer: len(pairs) for layer, pairs in plan.residual_pairs.items()} == {
        0: 0, 1: 4, 2: 4, 3: 0
    }  # fmt: skip
    both = read_tensors(folded["save"]), read_tensors(plain["save"])
    differing = {key for key, x in both[0].items() if not torch.equal(x, both[1][key])}
    assert differing == {f"decoder.layers.{i}.self_attention.linear_qkv.weight" for i in (2, 4)}


TRAIN_LAYOUTS = {
    "TP2+SP": LAYOUTS["TP2+SP"],
    "PP2": LAYOUTS["PP2"],
    "DP2": (2, "--use-distributed-optimizer"),
}


@pytest.fixture(scope="module")
def runs(base, varied, tmp_path_factory):
    """Return the flags and what is logged on one rank, by kind of run."""
    folder, load = tmp_path_factory.mktemp("runs"), ["--load", varied["save"]]
    teacher = ["--teacher-load", base["load"], "--kd-hidden-states", "mlp:3:7,attention:1:2"]
    words = {"alone": load, "distilled": [*load, *teacher]}
    return {
        name: (each, train(base, folder / name, *each), folder / name)
        for name, each in words.items()
    }


@pytest.mark.parametrize("layout", TRAIN_LAYOUTS)
@pytest.mark.parametrize("kind", ["alone", "distilled"])
def test_training_is_the_same_under_every_layout(kind, layout, runs, base, tmp_path):
    words, expected, _ = runs[kind]
    found = train(base, tmp_path / "run", *words, layout=TRAIN_LAYOUTS[layout])
    assert_same_curve(found, expected)
    assert checkpoints.read(str(tmp_path / "run")).arch == VARIED


@pytest.mark.parametrize("layouts", [("DP2", "PP2"), ("PP2", "TP2+SP"), ("TP2+SP", "DP2")])
def test_a_run_is_resumed_under_another_layout(layouts, runs, base, tmp_path):
    words, expected, _ = runs["alone"]
    first, second = (TRAIN_LAYOUTS[name] for name in layouts)
    optimizer = ["--use-distributed-optimizer"]
    train(base, tmp_path / "run", *words, *optimizer, "--train-iters", "2", layout=first)
    resume = ["--load", str(tmp_path / "run"), *optimizer, "--override-opt-param-scheduler"]
    assert_same_curve(train(base, tmp_path / "run", *resume, layout=second), expected)


def test_a_run_that_stops_goes_on_bit_for_bit(runs, base, tmp_path):
    words, expected, whole = runs["alone"]
    train(base, tmp_path / "run", *words, "--train-iters", "2")
    resume = ["--load", str(tmp_path / "run"), "--override-opt-param-scheduler"]
    assert train(base, tmp_path / "run", *resume) == expected
    assert_same_bytes(read_tensors(str(tmp_path / "run")), read_tensors(str(whole)))


# What is said and refused.


def test_tools_look_at_it(varied):
    code, out, _ = run_here(["tools/inspect_checkpoint.py", "--load", varied["save"]])
    assert not code
    assert "ffn_hidden_size of each" in out
    assert "64 40 80 24" in out
    assert not (Path(varied["save"]) / "release" / "megatron_args.sh").exists()


def test_export_is_refused(varied, tmp_path):
    argv = [
        "export",
        "--load",
        varied["save"],
        "--hf",
        str(tmp_path / "hf"),
        "--model-type",
        "llama",
    ]
    code, line = fail("tools.convert", argv)
    assert code == CHECKPOINT
    assert "layers differ in ffn_hidden_size, num_attention_heads, num_query_groups" in line
    assert "no Hugging Face family" in line
    assert not (tmp_path / "hf").exists()
    assert "layers that differ" in export_note(VARIED, BASE, {"model_type": "llama"})


REFUSED = {
    f"{TARGETS} --prune-iterations 2": ["--prune-iterations 2", "from layer to layer"],
    "--target-ffn-hidden-size 64,40": ["--target-ffn-hidden-size", "2 values for 4 mlp"],
    "--target-ffn-hidden-size 64,-1": ["--target-ffn-hidden-size", "is no whole number"],
    "--target-ffn-hidden-size 64,0,80,24": ["--target-ffn-hidden-size", "must be >= 1"],
    "--target-hidden-size 40,32": ["--target-hidden-size", "40,32"],
}


@pytest.mark.parametrize("targets", REFUSED)
def test_what_is_refused(targets, base, tmp_path):
    argv = ["--load", base["load"], *base["data"], "--calibration-samples", "8"]
    code, line = fail("prune", [*argv, *targets.split(), "--save", str(tmp_path / "x")])
    assert code == USAGE
    assert all(word in line for word in REFUSED[targets]), line
    assert "\n" not in line


def test_experts_are_alike():
    with pytest.raises(ValueError, match="moe_ffn_hidden_size cannot differ"):
        replace(MOE.by_sublayers(), by_layer=(("moe_ffn_hidden_size", (22, 20, 22, 22)),))


@pytest.mark.parametrize("layout", ["", "--tensor-model-parallel-size 2 --world-size 2"])
def test_a_dry_run(layout, base, varied):
    argv = ["prune.py", "--load", base["load"], *base["data"], "--calibration-samples", "8"]
    code, out, _ = run_here(
        [*argv, *TARGETS.split(), "--scores", "s", "--dry-run", *layout.split()]
    )
    assert (code, out.splitlines()[-1]) == (0, "OK")
    assert "ffn 24-80, heads 2-8/2-4" in out
    assert "for 1 forward passes" in out
    argv = ["pretrain_distill.py", "--load", varied["save"], *base["data"], *TRAIN]
    code, out, _ = run_here([*argv, "--dry-run", *layout.split()])
    assert (code, out.splitlines()[-1]) == (0, "OK")
    assert f"{num_parameters(VARIED):,} parameters" in out


def test_sizes_that_are_typed_are_compared_with_every_layer(base, varied):
    argv = ["--load", varied["save"], *base["data"], *TRAIN, "--ffn-hidden-size", "64"]
    code, line = fail("pretrain_distill", argv)
    assert code == CHECKPOINT
    assert "24-80" in line
