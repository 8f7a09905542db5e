"""Plans: what is kept, how units spread over tensor axes, what a file may not say."""

import json
from dataclasses import fields, replace

import pytest
import torch

from megatron_ext.arch import axes, dim_sizes
from megatron_ext.arch.rows import Axis, Size, one_each
from megatron_ext.pruning.kept import kept_indices
from megatron_ext.pruning.plan import Plan, check_plan, contradiction, load_plan, save_plan
from megatron_ext.pruning.planner import highest, lowest, make_plan
from megatron_ext.pruning.targets import target_arch
from megatron_ext.runtime.errors import CHECKPOINT, USAGE, UserError
from tests.models import GPT2, LLAMA, MOE, NEMOTRON
from tests.test_scores import random_scores

TINY = replace(  # 2 query groups of 3 heads, 2 channels each: rows that one can count
    LLAMA,
    num_layers=2,
    hidden_size=4,
    ffn_hidden_size=5,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=2,
)


def with_vectors(arch, **vectors):
    """Return scores of ``arch`` with some vectors replaced; dots in names are written ``__``."""
    scores = random_scores(arch)
    changed = {
        k.replace("__", "."): torch.tensor(v, dtype=torch.float32) for k, v in vectors.items()
    }
    return replace(scores, vectors={**scores.vectors, **changed})


def kept_of(plan, axis):
    """Return what ``plan`` keeps of one axis, by name."""
    return {name: units for name, units in plan.kept.items() if name.split(".")[0] == axis}


def test_the_highest_are_kept_in_ascending_order_and_ties_go_to_the_lower_index():
    assert highest(torch.tensor([0.1, 0.9, 0.5, 0.7]), 2) == (1, 3)
    assert highest(torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0]), 3) == (0, 1, 4)
    assert highest(torch.ones(1000), 700) == tuple(range(700))


def test_heads_are_ranked_within_their_query_group():
    scores = with_vectors(TINY, heads__0=[9, 8, 7, 1, 2, 3], heads__1=[1, 1, 1, 5, 6, 5])
    plan = make_plan(scores, TINY, target_arch(TINY, num_attention_heads=4))
    assert kept_of(plan, "heads") == {"heads.0": (0, 1, 4, 5), "heads.1": (0, 1, 3, 4)}
    assert plan.target.num_query_groups == 2


def test_without_query_groups_heads_of_a_layer_compete_and_take_their_keys_along():
    scores = with_vectors(GPT2, heads__0=[1, 4, 2, 3])
    plan = make_plan(scores, GPT2, target_arch(GPT2, num_attention_heads=3))
    assert plan.kept["heads.0"] == (1, 2, 3)
    assert plan.target.num_query_groups == 3
    rows = kept_indices(plan, "qkv", 0)
    assert torch.equal(rows, torch.arange(3 * 8, 4 * 3 * 8))  # head 0: its query, key and value


def test_layers_and_their_own_neurons():
    scores = with_vectors(LLAMA, layers=[0.5, 0.1, 0.2, 0.4])
    plan = make_plan(scores, LLAMA, target_arch(LLAMA, num_layers=3, ffn_hidden_size=16))
    assert plan.kept["layers"] == (0, 2, 3)
    names = [f"ffn.{i}" for i in (0, 2, 3)]
    assert kept_of(plan, "ffn") == {name: highest(scores.vectors[name], 16) for name in names}
    made = {"aggregation": "batch=l2,seq=mean", "samples": 8, "seq_length": 16, "depth": "block"}
    assert plan.made == made


def ordered(*order):
    """Return scores of LLAMA that remove layers in this order."""
    scores = with_vectors(LLAMA, layers=[0.5, 0.1, 0.2, 0.4])
    return replace(scores, depth="kl, rescored", removal_order=order)


def test_a_removal_order_goes_before_the_scores_of_layers():
    scores = ordered((3,), (0,), (1,))
    for count, layers in ((4, (0, 1, 2, 3)), (3, (0, 1, 2)), (2, (1, 2)), (1, (2,))):
        plan = make_plan(scores, LLAMA, target_arch(LLAMA, num_layers=count))
        assert plan.kept["layers"] == layers
    assert plan.made["depth"] == "kl, rescored"
    assert plan.made["removal_order"] == [[3], [0], [1]]
    plan = make_plan(ordered((1, 2)), LLAMA, target_arch(LLAMA, num_layers=2))
    assert plan.kept["layers"] == (0, 3)
    for order, count in ((((1, 2),), 3), (((1, 2),), 1), (((0,), (1,)), 1)):
        with pytest.raises(UserError, match=f"--target-num-layers {count} of 4"):
            make_plan(ordered(*order), LLAMA, target_arch(LLAMA, num_layers=count))


def test_the_lowest_score_and_of_equal_ones_the_last():
    assert lowest(torch.tensor([0.3, 0.1, 0.2])) == 1
    assert lowest(torch.tensor([0.1, 0.1, 0.2])) == 1


def test_identity_needs_no_scores_and_keeps_everything():
    plan = make_plan(None, LLAMA, target_arch(LLAMA))
    assert plan.target == LLAMA
    assert all(kept_indices(plan, dim, 1) is None for dim in dim_sizes(LLAMA))
    vectors = {"hidden": torch.rand(48)}  # the other axes do not change
    plan = make_plan(
        replace(random_scores(LLAMA), vectors=vectors), LLAMA, target_arch(LLAMA, hidden_size=32)
    )
    assert len(plan.kept["hidden"]) == 32
    assert plan.kept["layers"] == (0, 1, 2, 3)


def test_missing_scores_are_named():
    with pytest.raises(UserError, match=r"needs scores 'ffn.0'"):
        make_plan(None, LLAMA, target_arch(LLAMA, ffn_hidden_size=16))


def test_indices_of_every_dim():
    plan = Plan(
        source=TINY,
        target=replace(TINY, num_layers=1, hidden_size=2, ffn_hidden_size=2, num_attention_heads=4),
        kept={"layers": (1,), "hidden": (0, 3), "ffn.1": (1, 4), "heads.1": (0, 2, 3, 4)},
    )
    assert contradiction(plan) is None
    assert kept_indices(plan, "hidden", None).tolist() == [0, 3]
    assert kept_indices(plan, "ffn", 1).tolist() == [1, 4]
    assert kept_indices(plan, "fc1", 1).tolist() == [1, 4, 6, 9]  # gate, then up
    assert kept_indices(plan, "heads", 1).tolist() == [0, 1, 4, 5, 6, 7, 8, 9]
    # Rows of a group: 3 queries (6), key (2), value (2).
    group = [0, 1, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 16, 17, 18, 19]
    assert kept_indices(plan, "qkv", 1).tolist() == group[0] + group[1]
    assert all(kept_indices(plan, dim, None) is None for dim in ("vocab", "position", "head_dim"))
    plain = replace(plan, source=replace(TINY, swiglu=False))
    assert kept_indices(plain, "fc1", 1).tolist() == [1, 4]
    with pytest.raises(AssertionError, match="'channels'"):
        kept_indices(plan, "channels", 1)


def test_units_of_two_axes_on_one_dim(monkeypatch):
    """The first axis orders, then the second: heads, and of each kept head the kept channels."""
    channels = Axis(
        name="channels",
        size=Size(name="kv_channels", letter="C", help="channels of a head"),
        dims={
            "heads": lambda arch: [range(arch.kv_channels)] * arch.num_attention_heads,
            "qkv": lambda arch: [range(arch.kv_channels)] * (dim_sizes(arch)["qkv"] // 2),
            "head_dim": one_each("kv_channels"),
        },
    )
    monkeypatch.setattr(axes, "AXES", (*axes.AXES, channels))
    everything = make_plan(None, TINY, TINY)
    assert everything.kept["channels.0"] == (0, 1)
    plan = replace(everything, kept={**everything.kept, "channels.0": (1,)})
    assert kept_indices(plan, "heads", 0).tolist() == [1, 3, 5, 7, 9, 11]
    assert kept_indices(plan, "qkv", 0).tolist() == list(range(1, 20, 2))
    assert kept_indices(plan, "head_dim", 0).tolist() == [1]
    cut = {"channels.0": (1, 0), "heads.0": (0, 2, 5)}
    plan = replace(everything, kept={**everything.kept, **cut})
    assert kept_indices(plan, "heads", 0).tolist() == [1, 0, 5, 4, 11, 10]
    # 3 queries, key and value of each of the two groups.
    expected = [1, 0, 5, 4, 7, 6, 9, 8, 15, 14, 17, 16, 19, 18]
    assert kept_indices(plan, "qkv", 0).tolist() == expected


@pytest.mark.parametrize("arch", [LLAMA, GPT2, NEMOTRON, TINY])
def test_indices_fit_source_and_target(arch):
    target = target_arch(
        arch, num_layers=1, hidden_size=3, ffn_hidden_size=2, num_attention_heads=2
    )
    plan = make_plan(random_scores(arch), arch, target)
    for dim, size in dim_sizes(arch).items():
        kept = kept_indices(plan, dim, plan.kept["layers"][0])
        kept = torch.arange(size) if kept is None else kept
        assert len(kept) == dim_sizes(target)[dim]
        assert (kept.diff() > 0).all()
        assert kept.min() >= 0
        assert kept.max() < size


def pruned_plan():
    target = target_arch(
        LLAMA, num_layers=3, hidden_size=32, ffn_hidden_size=16, num_attention_heads=2
    )
    return make_plan(random_scores(LLAMA), LLAMA, target)


def test_round_trip(tmp_path):
    plan = pruned_plan()
    save_plan(tmp_path / "plan.json", plan)
    assert load_plan(tmp_path / "plan.json") == plan
    lines = (tmp_path / "plan.json").read_text().splitlines()
    sizes = [line for line in lines if any(f'"{f.name}": ' in line for f in fields(LLAMA))]
    assert len(sizes) == 2 * len(fields(LLAMA))  # a line per size and per vector: people read it
    vectors = [line for line in lines if "[" in line and "by_layer" not in line]
    # layers, hidden; heads and ffn of each layer
    assert len(vectors) == 2 + 2 * len(plan.kept["layers"])
    assert all(line.rstrip(",").endswith("]") for line in vectors)
    check_plan(plan, LLAMA)
    check_plan(plan, replace(LLAMA, hidden_dropout=0.1))


def test_the_file_has_units_by_axis_then_by_layer_and_expert():
    arch = replace(MOE, num_layers=1, num_experts=2, moe_ffn_hidden_size=3, hidden_size=2)
    values = json.loads(make_plan(None, arch, arch).to_json())
    assert list(values) == [
        *("format", "source", "target", "layers", "hidden", "heads", "ffn", "experts", "moe_ffn"),
        *("shared_ffn", "head_residual", "residual_pairs", "made"),
    ]
    assert (values["layers"], values["hidden"], values["ffn"]) == ([0], [0, 1], {})
    assert values["heads"] == {"0": [0, 1, 2, 3]}
    assert values["moe_ffn"] == {"0.0": [0, 1, 2], "0.1": [0, 1, 2]}


def test_folded_heads_make_the_round_trip_and_older_plans_fold_none(tmp_path):
    target = target_arch(LLAMA, num_layers=3, num_attention_heads=2)
    plan = make_plan(random_scores(LLAMA), LLAMA, target, head_residual="paper")
    save_plan(tmp_path / "plan.json", plan)
    assert load_plan(tmp_path / "plan.json") == plan
    values = json.loads(pruned_plan().to_json())
    del values["head_residual"], values["residual_pairs"]
    assert Plan.from_json(json.dumps(values)) == pruned_plan()


def test_an_axis_that_a_file_lacks_is_kept():
    target = target_arch(MOE, num_layers=2, num_experts=3)
    plan = make_plan(random_scores(MOE), MOE, target)
    values = json.loads(plan.to_json())
    del values["heads"], values["ffn"], values["moe_ffn"]
    assert Plan.from_json(json.dumps(values)) == plan
    del values["experts"]  # of which the target has fewer
    with pytest.raises(UserError, match="keeps 4 units, the target has 3"):
        Plan.from_json(json.dumps(values))


def edited(change):
    values = json.loads(pruned_plan().to_json())
    change(values)
    return json.dumps(values)


def set_in(*path, value):
    def change(values):
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("hidden"), "has no entry 'hidden'"),
        (lambda v: v["source"].pop("num_layers"), "num_layers"),
        (set_in("format", value="other"), "format is not"),
        (set_in("extra", value=1), "unknown entry 'extra'"),
        (set_in("layers", value=[0, 1.5, 2]), "list of integers"),
        (set_in("layers", value="012"), "list of integers"),
        (set_in("hidden", 0, value=True), "list of integers"),
        (set_in("ffn", value=[]), "cannot be read"),
        (set_in("source", "hidden_size", value="48"), "hidden_size is '48'"),
        (set_in("source", "moe_latent_size", value=8), "unknown size 'moe_latent_size'"),
        (set_in("layers", value=[0, 2]), "layers keeps 2 units, the target has 3"),
        (set_in("hidden", -1, value=48), "hidden names unit 48 of 48"),
        (set_in("hidden", 0, value=-1), "hidden names unit -1 of 48"),
        (lambda v: v["hidden"].sort(reverse=True), "hidden does not ascend"),
        (lambda v: v["hidden"].__setitem__(1, v["hidden"][0]), "hidden does not ascend or repeats"),
        (lambda v: v["ffn"].pop(next(iter(v["ffn"]))), "ffn names layers"),
        (lambda v: v["heads"].update({"3": [0, 1]}), "heads"),
        (lambda v: v["heads"].update({k: [0, 1] for k in v["heads"]}), "of its query groups"),
        (set_in("head_residual", value="paper"), "residual_pairs names layers"),
        (set_in("head_residual", value=3), "head_residual is 3, not one of none, paper, laco"),
        (set_in("residual_pairs", value={"0": [[1]]}), "cannot be read"),
        (set_in("target", "vocab_size", value=7), "vocab_size is 100 in the source and 7"),
        (set_in("target", "num_query_groups", value=1), "the target has 1 groups"),
    ],
)
def test_plans_that_cannot_be_are_refused(tmp_path, change, message):
    path = tmp_path / "plan.json"
    path.write_text(edited(change))
    with pytest.raises(UserError, match=message) as error:
        load_plan(path)
    assert error.value.code == CHECKPOINT
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", None])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"--plan .*plan\.json"):
        load_plan(path)


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(UserError, match="rotary_base 10000, this one has 500000"):
        check_plan(pruned_plan(), replace(LLAMA, rotary_base=500000))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 64}, "--target-hidden-size 64: choose from 1 to the checkpoint's 48"),
        ({"num_layers": 0}, "--target-num-layers 0"),
        ({"num_attention_heads": 3}, "each of 2 query groups keeps the same number of its 2 heads"),
    ],
)
def test_impossible_targets_are_refused(sizes, message):
    with pytest.raises(UserError, match=message) as error:
        target_arch(LLAMA, **sizes)
    assert error.value.code == USAGE


def test_a_target_of_another_kind_is_refused():
    with pytest.raises(UserError, match="swiglu is True in the source and False"):
        make_plan(random_scores(LLAMA), LLAMA, replace(LLAMA, swiglu=False))


def test_whole_query_groups_by_the_norm_of_their_heads():
    arch = replace(TINY, num_layers=1, num_attention_heads=6, num_query_groups=3)
    scores = with_vectors(arch, heads__0=[5.0, 0, 3, 3.9, 3, 4.1])  # groups: 5, 4.9, 5.08
    plan = make_plan(scores, arch, target_arch(arch, num_query_groups=2))
    assert kept_of(plan, "heads") == {"heads.0": (0, 1, 4, 5)}
    assert (plan.target.num_query_groups, plan.target.num_attention_heads) == (2, 4)
    assert kept_indices(plan, "qkv", 0).tolist() == [*range(8), *range(16, 24)]
    fewer = target_arch(arch, num_query_groups=2, num_attention_heads=2)
    assert make_plan(scores, arch, fewer).kept["heads.0"] == (0, 5)
    with pytest.raises(UserError, match="whole groups"):
        make_plan(scores, arch, fewer, head_residual="paper")
    separate = replace(arch, num_query_groups=6)
    assert target_arch(separate, num_query_groups=4).num_attention_heads == 4
    with pytest.raises(UserError, match="give one of them"):
        target_arch(separate, num_query_groups=4, num_attention_heads=2)
    with pytest.raises(UserError, match="each of 2 query groups"):
        target_arch(arch, num_query_groups=2, num_attention_heads=6)


def test_experts_are_ranked_in_their_layer_and_neurons_in_their_expert():
    arch = replace(MOE, num_layers=1, num_experts=3, moe_ffn_hidden_size=3)
    scores = with_vectors(
        arch,
        experts__0=[1.0, 3, 2],
        moe_ffn__0__1=[0.0, 9, 8],
        moe_ffn__0__2=[7.0, 1, 2],
    )
    plan = make_plan(scores, arch, target_arch(arch, num_experts=2, moe_ffn_hidden_size=2))
    kept = {name: plan.kept[name] for name in plan.kept if name not in ("layers", "hidden")}
    assert kept == {
        "heads.0": tuple(range(4)),
        "experts.0": (1, 2),
        "moe_ffn.0.1": (1, 2),
        "moe_ffn.0.2": (0, 2),
        "shared_ffn.0": tuple(range(14)),
    }
    assert Plan.from_json(plan.to_json()) == plan
    assert kept_indices(plan, "moe_fc1", 0, 2).tolist() == [0, 2, 3, 5]
    kept = dict(plan.kept)
    del kept["moe_ffn.0.2"]
    problem = contradiction(replace(plan, kept=kept))
    assert problem == "moe_ffn names experts 0.1, kept are 0.1 0.2"
    with pytest.raises(UserError, match="--target-num-experts 1: the router sends a token to 2"):
        target_arch(arch, num_experts=1)
    with pytest.raises(UserError, match=r"--target-ffn-hidden-size 8: .* none"):
        target_arch(arch, ffn_hidden_size=8)
