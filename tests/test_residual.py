"""Pruned heads folded into kept ones: which pairs, which rows, which numbers."""

import re
from dataclasses import replace

import pytest
import torch

from megatron_ext.arch import shape, weights
from megatron_ext.pruning.fold import fold_heads
from megatron_ext.pruning.plan import contradiction
from megatron_ext.pruning.planner import make_plan
from megatron_ext.pruning.residual import mirrored_pairs
from megatron_ext.pruning.targets import target_arch
from megatron_ext.pruning.trim import trim_tensor, trimmed_share
from megatron_ext.runtime.errors import USAGE, UserError
from tests.models import GPT2, LLAMA, NEMOTRON
from tests.test_plan import with_vectors
from tests.test_scores import random_scores

# Rows that one can count: 2 query groups of 3 heads (or 3 heads without groups), one channel each.
GROUPED = replace(
    LLAMA, num_layers=1, num_attention_heads=6, num_query_groups=2, kv_channels=1, hidden_size=2
)
SEPARATE = replace(GROUPED, num_attention_heads=3, num_query_groups=3)


def one_based(length, count):
    """Return the pairs of heads that are called 1, 2, ... by importance."""
    return set(mirrored_pairs(range(1, length + 1), count))


def test_the_pairs_are_mirrored_at_the_cut():
    assert one_based(6, 3) == {(3, 4), (2, 5), (1, 6)}
    assert one_based(8, 6) == {(6, 7), (5, 8)}
    assert one_based(6, 6) == set()


@pytest.mark.parametrize(("length", "count"), [(48, 24), (48, 32), (8, 6), (6, 3), (6, 4)])
def test_the_partners_are_the_pruned_heads_each_once(length, count):
    pairs = mirrored_pairs(range(1, length + 1), count)
    assert {(i, 2 * count - i + 1) for i in range(2 * count - length + 1, count + 1)} == set(pairs)
    assert sorted(pruned for _, pruned in pairs) == list(range(count + 1, length + 1))
    assert all(1 <= kept <= count for kept, _ in pairs)


def test_pairs_follow_the_ranking():
    assert mirrored_pairs([4, 0, 7, 2], 3) == ((7, 2),)
    assert mirrored_pairs([4, 0, 7, 2], 2) == ((0, 7), (4, 2))


def test_too_few_kept_heads_are_refused():
    with pytest.raises(UserError, match="2 of 5 heads") as error:
        mirrored_pairs(range(5), 2)
    assert error.value.code == USAGE


def test_pairs_stay_within_query_groups_and_without_groups_within_the_layer():
    scores = with_vectors(GROUPED, heads__0=[9, 8, 7, 1, 3, 2])
    target = target_arch(GROUPED, num_attention_heads=4)
    plan = make_plan(scores, GROUPED, target, head_residual="paper")
    assert plan.kept["heads.0"] == (0, 1, 4, 5)
    assert plan.residual_pairs == {0: ((1, 2), (5, 3))}
    scores = with_vectors(SEPARATE, heads__0=[1, 9, 5])
    target = target_arch(SEPARATE, num_attention_heads=2)
    plan = make_plan(scores, SEPARATE, target, head_residual="laco")
    assert plan.residual_pairs == {0: ((2, 0),)}


def test_a_plan_that_keeps_all_heads_folds_none():
    plan = make_plan(
        random_scores(LLAMA), LLAMA, target_arch(LLAMA, hidden_size=32), head_residual="paper"
    )
    assert (plan.head_residual, plan.residual_pairs) == ("none", {})


def test_numbers_that_one_can_read():
    # Rows: q0 q1 q2 k v | q3 q4 q5 k v.
    bias = torch.arange(10.0)
    assert fold_heads(bias, "paper", ((1, 2), (5, 3)), GROUPED).tolist() == [
        0, 2 * 1 - 2, 2, 3, 4, 5, 6, 2 * 7 - 5, 8, 9
    ]  # fmt: skip
    assert fold_heads(bias, "laco", ((1, 2), (5, 3)), GROUPED).tolist() == [
        0, 2, 2, 3, 4, 5, 6, 5, 8, 9
    ]  # fmt: skip
    # Without groups, keys and values too: q0 k0 v0 | q1 k1 v1 | q2 k2 v2.
    weight = torch.stack([torch.arange(9.0), 10 * torch.arange(9.0)], dim=1)
    folded = fold_heads(weight, "paper", ((2, 0),), SEPARATE)
    assert folded[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14]
    assert folded[:, 1].tolist() == [0, 10, 20, 30, 40, 50, 120, 130, 140]
    assert weight[6, 0] == 6, "the given tensor stays"


def test_a_pruned_head_like_its_partner_changes_nothing_in_the_paper_s_form():
    arch = NEMOTRON
    weight = torch.randn(shape(next(w for w in weights(arch) if "qkv.w" in w.key), arch))
    width, per_group = arch.kv_channels, 4
    blocks = weight.view(arch.num_query_groups, per_group + 2, width, -1)
    blocks[1, 3] = blocks[1, 0]  # head 7 like head 4
    assert torch.equal(fold_heads(weight, "paper", ((4, 7),), arch), weight)
    assert torch.equal(fold_heads(weight, "laco", ((4, 7),), arch), weight)
    assert not torch.equal(fold_heads(weight, "paper", ((4, 6),), arch), weight)


def test_half_precision_is_rounded_once():
    x = torch.tensor([1.0078125, 0.0, 0.0, 0.00390625, 0.0] * 2).to(torch.bfloat16)  # 1 + 2**-7
    x[1] = 2**-8
    folded = fold_heads(x, "paper", ((0, 1),), GROUPED)
    assert folded.dtype == torch.bfloat16
    assert folded[0] == (2 * x[0].float() - x[1].float()).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (((1, 2), (4, 3), (5, 3)), r"the heads \[2, 3, 3\] are not the pruned ones"),
        (((1, 2),), r"\[2\] are not the pruned ones"),
        (((1, 2), (1, 3)), "not different kept ones"),
        (((2, 1), (4, 3)), "not different kept ones"),
        (((1, 3), (4, 2)), "different query groups"),
    ],
)
def test_pairs_that_cannot_be(pairs, message):
    scores = with_vectors(GROUPED, heads__0=[9, 8, 7, 1, 3, 2])
    target = target_arch(GROUPED, num_attention_heads=4)
    plan = make_plan(scores, GROUPED, target, head_residual="paper")
    assert contradiction(plan) is None
    assert re.search(message, contradiction(replace(plan, residual_pairs={0: pairs})))


def test_mode_and_pairs_need_each_other():
    scores = with_vectors(GROUPED, heads__0=[9, 8, 7, 1, 3, 2])
    target = target_arch(GROUPED, num_attention_heads=4)
    plan = make_plan(scores, GROUPED, target, head_residual="paper")
    assert "names layers [0], not []" in contradiction(replace(plan, head_residual="none"))
    assert "names layers [], not [0]" in contradiction(replace(plan, residual_pairs={}))
    assert "'sum', not one of" in contradiction(replace(plan, head_residual="sum"))


class FakeReader:
    """A checkpoint in memory: every tensor random, layers stacked."""

    def __init__(self, arch):
        self.folder, self.objects = "memory", set()
        self.tensors = {
            w.key: torch.randn((arch.num_layers,) * w.per_layer + shape(w, arch))
            for w in weights(arch)
        }
        self.shapes = {key: (tuple(x.shape), x.dtype) for key, x in self.tensors.items()}

    def read(self, key, index, out=None):
        return self.tensors[key]

    def read_layer(self, key, layer, out=None, *, expert=None):
        return self.tensors[key][layer]


@pytest.mark.parametrize("mode", ["paper", "laco"])
@pytest.mark.parametrize("arch", [LLAMA, GPT2], ids=["grouped", "separate"])
def test_trimming_folds_the_rows_of_heads_and_nothing_else(arch, mode):
    reader, target = FakeReader(arch), target_arch(arch, num_attention_heads=2, num_layers=3)
    plan = make_plan(random_scores(arch), arch, target, head_residual=mode)
    share = trimmed_share(reader, plan, 0, 1)
    per_group = arch.num_attention_heads // arch.num_query_groups
    for shard in share.values():
        weight = next(w for w in weights(arch) if w.key == shard.key)
        layer = plan.kept["layers"][shard.global_offset[0]] if weight.per_layer else None
        source = reader.tensors[shard.key]
        source = (source[layer] if weight.per_layer else source).clone()
        expected = trim_tensor(source, weight.dims, plan, layer)
        if "linear_qkv.weight" in shard.key or "linear_qkv.bias" in shard.key:
            assert not torch.equal(shard.data, expected)
            naive = source.reshape(arch.num_query_groups, per_group + 2, arch.kv_channels, -1)
            before = naive.clone()
            for kept, pruned in plan.residual_pairs[layer]:
                g, h = kept // per_group, kept % per_group
                g2, h2 = pruned // per_group, pruned % per_group
                parts = [(h, h2)] if per_group > 1 else [(0, 0), (1, 1), (2, 2)]
                for to, of in parts:
                    new = 2 * before[g, to] - before[g2, of] if mode == "paper" else before[g2, of]
                    naive[g, to] = new
            expected = trim_tensor(naive.reshape(source.shape), weight.dims, plan, layer)
        assert torch.equal(shard.data, expected), shard.key
