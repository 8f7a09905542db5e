"""Trimming against naive slices, and as models: masked = trimmed, permuted = same, identity = same.

The naive reference reshapes a whole weight so that every unit has an axis of its own; it shares no
code with ``kept_indices``.
"""

import math
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_ext.arch import dim_sizes, shape, weights
from megatron_ext.checkpoint import checkpoints, writer
from megatron_ext.checkpoint.slices import SliceReader, layer_key
from megatron_ext.model.build import build_model, model_state_dict
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.open import restore_weights
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.planner import make_plan
from megatron_ext.pruning.targets import target_arch
from megatron_ext.pruning.trim import (
    check_tensors,
    deal,
    empty_extra_states,
    pieces,
    trim_tensor,
    trimmed_share,
)
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import CHECKPOINT, UserError
from tests.models import BERT, GPT2, LLAMA, MIXTRAL, MOE, NEMOTRON, random_batch
from tests.ranks import run_ranks
from tests.test_scores import random_scores

SMALLER = {"num_layers": 3, "hidden_size": 28, "ffn_hidden_size": 20, "num_attention_heads": 2}
FEWER_EXPERTS = {
    "num_layers": 3,
    "hidden_size": 20,
    "num_attention_heads": 2,
    "num_experts": 3,
    "moe_ffn_hidden_size": 13,
}
SHARED = {"moe_shared_expert_intermediate_size": 9}
MODELS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "nemotron": NEMOTRON,
    "bert": BERT,
    "moe": MOE,
    "mixtral": MIXTRAL,
}
TARGETS = {
    **dict.fromkeys(("llama", "gpt2", "nemotron", "bert"), SMALLER),
    "moe": FEWER_EXPERTS | SHARED,
    "mixtral": FEWER_EXPERTS,
}


def plan_of(arch, **sizes):
    return make_plan(random_scores(arch), arch, target_arch(arch, **sizes))


# Naive reference.


def naive_trim(tensor, dims, plan, layer, expert=None):
    for axis, dim in enumerate(dims):
        tensor = naive_cut(tensor.movedim(axis, 0), dim, plan, layer, expert).movedim(0, axis)
    return tensor


def naive_cut(x, dim, plan, layer, expert):
    """Keep units along the first axis of ``x``."""
    arch, rest = plan.source, x.shape[1:]
    heads, groups, width = arch.num_attention_heads, arch.num_query_groups, arch.kv_channels
    if dim == "hidden":
        return x[list(plan.kept["hidden"])]
    if dim == "experts":
        return x[list(plan.kept[f"experts.{layer}"])]
    if dim.endswith(("ffn", "fc1")):
        name = f"{dim.replace('fc1', 'ffn')}.{layer}"
        kept = list(plan.kept[f"{name}.{expert}" if dim.startswith("moe") else name])
        halves = x.chunk(2) if dim.endswith("fc1") and arch.swiglu else [x]
        return torch.cat([half[kept] for half in halves])
    if dim == "heads":
        return x.reshape(heads, width, *rest)[list(plan.kept[f"heads.{layer}"])].reshape(-1, *rest)
    if dim == "qkv":
        x = x.reshape(groups, heads // groups + 2, width, *rest)
        per_group = x[:, :-2].flatten(0, 1), x[:, -2], x[:, -1]  # queries [heads], keys, values
        kept = []
        for group in range(groups):
            mine = [h for h in plan.kept[f"heads.{layer}"] if h // (heads // groups) == group]
            if mine:
                kept += [per_group[0][h] for h in mine] + [per_group[1][group], per_group[2][group]]
        return torch.cat(kept)
    return x


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_weight_is_cut_as_by_naive_slices(name, dtype):
    arch = MODELS[name]
    plan = plan_of(arch, **TARGETS[name])
    before, after = dim_sizes(arch), dim_sizes(plan.target)
    for piece in pieces(plan):
        x = torch.randn([before[dim] for dim in piece.dims]).to(dtype)
        place = (piece.layer, piece.expert)
        trimmed = trim_tensor(x, piece.dims, plan, *place)
        assert trimmed.dtype == dtype
        assert trimmed.shape == tuple(after[dim] for dim in piece.dims)
        assert torch.equal(trimmed, naive_trim(x, piece.dims, plan, *place)), piece.weight.key
    seen = {(piece.weight.key, piece.new_layer, piece.new_expert) for piece in pieces(plan)}
    assert len(seen) == len(list(pieces(plan)))


def test_numbers_that_one_can_read():
    arch = replace(
        LLAMA, num_layers=1, hidden_size=3, ffn_hidden_size=4, num_attention_heads=4, kv_channels=1
    )
    plan = Plan(
        source=arch,
        target=replace(arch, hidden_size=2, ffn_hidden_size=2, num_attention_heads=2),
        kept={"layers": (0,), "hidden": (0, 2), "ffn.0": (1, 3), "heads.0": (1, 2)},
    )

    def trim(rows, columns, *dims):
        numbers = 10 * torch.arange(rows).unsqueeze(1) + torch.arange(columns)
        return trim_tensor(numbers, dims, plan, 0).tolist()

    # Row 1, column 2 holds 12. Rows of qkv: q0 q1 k v | q2 q3 k v.
    assert trim(8, 3, "qkv", "hidden") == [
        [10, 12], [20, 22], [30, 32], [40, 42], [60, 62], [70, 72]
    ]  # fmt: skip
    assert trim(3, 4, "hidden", "heads") == [[1, 2], [21, 22]]
    assert trim(8, 3, "fc1", "hidden") == [[10, 12], [30, 32], [50, 52], [70, 72]]
    assert trim(3, 4, "hidden", "ffn") == [[1, 3], [21, 23]]


def test_identity_returns_the_tensor_itself():
    plan = plan_of(LLAMA)
    for weight in weights(LLAMA):
        x = torch.randn(shape(weight, LLAMA))
        assert trim_tensor(x, weight.dims, plan, 1) is x


# Checkpoints.


def random_checkpoint(arch, dtype=torch.bfloat16):
    """Return a whole model as {key: [...]} and {key: [L, ...]}."""
    generator = torch.Generator().manual_seed(5)
    layers = {True: (arch.num_layers,), False: ()}
    return {
        w.key: torch.randn(*layers[w.per_layer], *shape(w, arch), generator=generator).to(dtype)
        for w in weights(arch)
    }


def save_tensors(root, tensors, stacked):
    state = {"args": Namespace()}
    for key, tensor in tensors.items():
        if stacked or not key.startswith("decoder.layers."):
            state[key] = ShardedTensor.from_rank_offsets(key, tensor)
            continue
        for layer, x in enumerate(tensor):
            name = layer_key(key, layer)
            state[name] = ShardedTensor.from_rank_offsets(name, x.clone())
    writer.save(root, "release", state, files={})


def shares(folder, plan, world_size):
    """Return every rank's share as {key: (offset, data, global shape)} lists."""
    reader = SliceReader(folder)
    return [list(trimmed_share(reader, plan, r, world_size).values()) for r in range(world_size)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of LLAMA in both styles."""
    roots = [tmp_path_factory.mktemp("checkpoint") for _ in range(2)]
    for root, stacked in zip(roots, (True, False), strict=True):
        run_ranks(1, save_tensors, str(root), random_checkpoint(LLAMA), stacked)
    return [root / "release" for root in roots]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("style", [0, 1], ids=["stacked", "per layer"])
def test_shares_cover_every_element_of_the_target_once(folders, style, world_size):
    plan, source = plan_of(LLAMA, **SMALLER), random_checkpoint(LLAMA)
    expected = {}
    for weight in weights(LLAMA):
        x = source[weight.key]
        if weight.per_layer:
            cut = [naive_trim(x[layer], weight.dims, plan, layer) for layer in plan.kept["layers"]]
            expected[weight.key] = torch.stack(cut)
        else:
            expected[weight.key] = naive_trim(x, weight.dims, plan, None)
    seen = {key: torch.zeros(x.shape) for key, x in expected.items()}
    for share in shares(folders[style], plan, world_size):
        for shard in share:
            axes = shard.prepend_axis_num
            place = (*shard.global_offset[:axes],) if axes else slice(None)
            assert shard.global_shape == expected[shard.key].shape
            assert shard.data.dtype == torch.bfloat16
            assert torch.equal(shard.data, expected[shard.key][place]), shard.key
            seen[shard.key][place] += 1
    assert all((count == 1).all() for count in seen.values())


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_ranks_hold_about_the_same(world_size):
    plan = plan_of(LLAMA, num_layers=3)
    sizes = [
        [math.prod(shape(piece.weight, plan.target)) for piece in hand]
        for hand in deal(pieces(plan), plan.target, world_size)
    ]
    loads = [sum(hand) for hand in sizes]
    assert max(loads) - min(loads) <= min(max(hand) for hand in sizes)


def test_identity_gives_the_same_bytes(folders):
    plan, source = make_plan(None, LLAMA, LLAMA), random_checkpoint(LLAMA)
    (share,) = shares(folders[0], plan, 1)
    for shard in share:
        x = source[shard.key]
        x = x[shard.global_offset[0]] if shard.prepend_axis_num else x
        assert torch.equal(shard.data.view(torch.int16), x.view(torch.int16))


def test_tensors_that_the_table_does_not_expect_are_named(folders):
    reader = SliceReader(folders[0])
    check_tensors(reader, LLAMA)
    for ignored in ("optimizer.state.exp_avg.x", "chained_0.x", "rng_state/0", "a._extra_state/0"):
        reader.shapes[ignored] = ((3,), torch.float32)
    check_tensors(reader, LLAMA)
    for arch, message in (
        (replace(LLAMA, ffn_hidden_size=79), r"linear_fc1.weight is \[4, 160, 48\], .* 158, 48\]"),
        (replace(LLAMA, num_layers=3), r"is \[4, 48\], the saved args say \[3, 48\]"),
        (replace(LLAMA, qk_layernorm=True), "has no tensor .*q_layernorm.weight"),
        (replace(LLAMA, untie_embeddings_and_output_weights=False), "tensor output_layer.weight"),
    ):
        with pytest.raises(UserError, match=message) as error:
            check_tensors(reader, arch)
        assert error.value.code == CHECKPOINT
    reader.shapes["decoder.layers.mlp.router.weight"] = ((4, 8, 48), torch.float32)
    with pytest.raises(UserError, match=r"router\.weight has no row in the table"):
        check_tensors(reader, LLAMA)


def test_extra_states_follow_the_layers_and_are_empty():
    objects = {
        "decoder.layers.mlp.linear_fc1._extra_state/shard_3_4",
        "decoder.layers.0.mlp.linear_fc2._extra_state/shard_0_1",
        "decoder.layers.3.mlp.linear_fc2._extra_state/shard_0_1",
        "output_layer._extra_state/shard_0_1",
        "rng_state/shard_0_1",
    }
    states = empty_extra_states(SimpleNamespace(objects=objects), replace(LLAMA, num_layers=2))
    assert all(state.data is None for state in states.values())
    assert {state.unique_key for state in states.values()} == {
        "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2",
        "decoder.layers.mlp.linear_fc1._extra_state/shard_1_2",
        "decoder.layers.mlp.linear_fc2._extra_state/shard_0_2",
        "decoder.layers.mlp.linear_fc2._extra_state/shard_1_2",
        "output_layer._extra_state/shard_0_1",
    }


# Models. Source and target run in float64, where what differs is a mistake.


def logits(chunks, arch):
    batch = random_batch(arch, num_samples=2, seq_length=12)
    with torch.no_grad():
        return chunks[0](batch["tokens"], batch["position_ids"], None)


def save_model(root, chunks, arch):
    writer.save(
        root, "release", model_state_dict(chunks) | {"args": Namespace(**arch.to_args())}, files={}
    )


def load_model(root, arch, groups):
    chunks = build_model(arch, ModelOptions(params_dtype=torch.float64), groups)
    restore_weights(chunks, checkpoints.read(root))
    return chunks


def random_model(arch, groups):
    """Return a model whose norms and biases are not trivial."""
    chunks = build_model(arch, ModelOptions(params_dtype=torch.float64), groups, seed=7)
    generator = torch.Generator().manual_seed(9)
    for parameter in chunks[0].parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return chunks


def save_share(root, source, plan):
    share = trimmed_share(
        SliceReader(f"{source}/release"),
        plan,
        torch.distributed.get_rank(),
        torch.distributed.get_world_size(),
    )
    writer.save(
        root, "release", {"model": share, "args": Namespace(**plan.target.to_args())}, files={}
    )


def cut(x, axis, kept, block=1):
    """Zero in place the blocks of ``x`` along ``axis`` that are not kept."""
    x = x.data.movedim(axis, 0)
    for unit in set(range(len(x) // block)) - set(kept):
        x[unit * block : (unit + 1) * block] = 0


def mask(model, plan):
    """Switch off in a whole model the units that ``plan`` drops."""
    arch = plan.source
    for number, layer in enumerate(model.decoder.layers):
        proj, outputs = layer.self_attention.linear_proj, output_matrices(layer.mlp)
        if number not in plan.kept["layers"]:
            if arch.apply_residual_connection_post_layernorm:  # what it adds to, it normalises
                layer.forward = hand_on
            for linear in (proj, *outputs):
                for parameter in linear.parameters():
                    parameter.data.zero_()
            continue
        cut(proj.weight, 1, plan.kept[f"heads.{number}"], arch.kv_channels)
        if arch.num_experts is None:
            cut(outputs[0].weight, 1, plan.kept[f"ffn.{number}"])
            continue
        for expert in plan.kept[f"experts.{number}"]:
            cut(outputs[expert].weight, 1, plan.kept[f"moe_ffn.{number}.{expert}"])
        for shared in outputs[arch.num_experts :]:
            cut(shared.weight, 1, plan.kept[f"shared_ffn.{number}"])
        layer.mlp.router.gating = without(plan.kept[f"experts.{number}"], layer.mlp.router.gating)


def hand_on(hidden_states, **inputs):
    """Stand in for a layer that does nothing."""
    return hidden_states, None


def output_matrices(mlp):
    """Return linear_fc2 of a plain MLP, or of each expert and then of the shared ones."""
    if not hasattr(mlp, "experts"):
        return [mlp.linear_fc2]
    shared = [mlp.shared_experts.linear_fc2] if mlp.shared_experts is not None else []
    return [expert.linear_fc2 for expert in mlp.experts.local_experts] + shared


def without(kept, gating):
    """Return a router's scores with those of the experts that go at minus infinity."""

    def masked(x):
        logits = gating(x)
        gone = [expert for expert in range(logits.size(-1)) if expert not in kept]
        logits[..., gone] = -math.inf
        return logits

    return masked


def mask_hidden(model, plan, correct_norms):
    """Hold dropped channels of the residual stream at zero.

    The root mean square over d channels of which d' are kept is sqrt(d'/d) of that over the d'
    kept ones: with ``correct_norms``, gamma takes that factor and epsilon its square.
    """
    cut(model.embedding.word_embeddings.weight, 1, plan.kept["hidden"])
    norms = [model.decoder.final_layernorm]
    for layer in model.decoder.layers:
        for linear in (layer.self_attention.linear_proj, *output_matrices(layer.mlp)):
            for parameter in linear.parameters():
                cut(parameter, 0, plan.kept["hidden"])
        norms += [layer.input_layernorm, layer.pre_mlp_layernorm]
    if correct_norms:
        ratio = plan.target.hidden_size / plan.source.hidden_size
        for norm in norms:
            norm.weight.data *= ratio**0.5
            norm.eps *= ratio


def masked_and_trimmed(root, plans):
    """Return (logits of the trimmed model, logits of the masked source) for each plan.

    A plan that drops channels of the residual stream also returns the latter without the norms
    corrected.
    """
    groups = platform.initialize().groups
    save_model(f"{root}/source", random_model(plans[0].source, groups), plans[0].source)
    results = []
    for plan in plans:
        save_share(f"{root}/target", f"{root}/source", plan)
        source = load_model(f"{root}/source", plan.source, groups)
        target = load_model(f"{root}/target", plan.target, groups)
        mask(source[0], plan)
        results.append([logits(target, plan.target)])
        if plan.target.hidden_size < plan.source.hidden_size:
            mask_hidden(source[0], plan, correct_norms=False)
            results[-1].append(logits(source, plan.source))
            mask_hidden(source[0], plan, correct_norms=True)
        results[-1].insert(1, logits(source, plan.source))
    return results


AXES = {
    "llama": ({"num_query_groups": 1},),
    "gpt2": ({"num_query_groups": 3},),  # every head a group of its own
    "nemotron": ({"num_query_groups": 1}, {"num_query_groups": 1, "num_attention_heads": 2}),
    "bert": ({"num_layers": 1},),
    "moe": (
        {"num_experts": 2},
        {"moe_ffn_hidden_size": 7},
        SHARED,
        {**SHARED, "num_experts": 3, "moe_ffn_hidden_size": 11, "num_layers": 2},
    ),
    "mixtral": ({"num_experts": 5, "moe_ffn_hidden_size": 21},),
}


@pytest.mark.parametrize("name", MODELS)
def test_trimming_equals_masking(name, tmp_path):
    dense = (
        {"ffn_hidden_size": 24},
        {"num_layers": 3, "ffn_hidden_size": 17, "num_attention_heads": 2},
    )
    everywhere = ({"num_attention_heads": 2}, {"num_layers": 2})
    arch = MODELS[name]
    axes = (*everywhere, *AXES[name], *dense * (arch.num_experts is None))
    plans = [plan_of(arch, **sizes) for sizes in axes]
    for trimmed, masked in run_ranks(1, masked_and_trimmed, str(tmp_path), plans)[0]:
        torch.testing.assert_close(trimmed, masked, rtol=1e-11, atol=1e-11)


def test_trimming_hidden_equals_masking_with_the_norms_corrected(tmp_path):
    for plans in (
        [plan_of(LLAMA, hidden_size=40), plan_of(LLAMA, **SMALLER)],
        [plan_of(MOE, **TARGETS["moe"])],
    ):
        results = run_ranks(1, masked_and_trimmed, str(tmp_path), plans)[0]
        for trimmed, masked, uncorrected in results:
            torch.testing.assert_close(trimmed, masked, rtol=1e-10, atol=1e-10)
            assert (trimmed - uncorrected).abs().max() > 1e-2


def permuted_logits(root, arch):
    """Return logits of a model and of the same with all units in another order."""
    # The router's is float32 inside, which depends on the order of experts.
    softmax = torch.softmax
    torch.softmax = lambda x, dim, dtype=None: softmax(x, dim)
    groups = platform.initialize().groups
    source = random_model(arch, groups)
    save_model(f"{root}/source", source, arch)
    save_share(f"{root}/target", f"{root}/source", permutation(arch))
    return logits(source, arch), logits(load_model(f"{root}/target", arch, groups), arch)


def permutation(arch):
    """Return a plan that keeps all units in another order (a valid plan keeps their order)."""
    generator = torch.Generator().manual_seed(2)

    def shuffled(length):
        return tuple(torch.randperm(length, generator=generator).tolist())

    per_group = arch.num_attention_heads // arch.num_query_groups
    # Groups in their order, except where each head is a group of its own.
    groups = shuffled(arch.num_query_groups) if per_group == 1 else range(arch.num_query_groups)
    everything = make_plan(None, arch, arch).kept
    kept = {name: shuffled(len(units)) for name, units in everything.items()}
    kept |= {
        f"heads.{layer}": tuple(g * per_group + h for g in groups for h in shuffled(per_group))
        for layer in range(arch.num_layers)
    }
    return Plan(source=arch, target=arch, kept={**kept, "layers": everything["layers"]})


@pytest.mark.parametrize("name", MODELS)
def test_permuting_units_changes_no_logit(name, tmp_path):
    before, after = run_ranks(1, permuted_logits, str(tmp_path), MODELS[name])[0]
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


# Layouts: written by one, trimmed by some ranks, read by another.


def save_source(root, layout):
    groups = platform.initialize(**layout).groups
    chunks = build_model(LLAMA, ModelOptions(params_dtype=torch.float64), groups, seed=7)
    save_model(root, chunks, LLAMA)


def load_whole(root, arch):
    groups = platform.initialize().groups
    return [p.data for p in load_model(root, arch, groups)[0].parameters()]


def test_no_layout_changes_a_trimmed_weight(tmp_path):
    plan, weights_of = plan_of(LLAMA, **SMALLER), []
    for name, layout, writers, trimmers in (
        ("TP1", {}, 1, 1),
        ("TP2", {"tensor_model_parallel_size": 2}, 2, 2),
    ):
        source, target = str(tmp_path / name), str(tmp_path / f"{name} trimmed")
        run_ranks(writers, save_source, source, layout)
        run_ranks(trimmers, save_share, target, source, plan)
        weights_of += run_ranks(1, load_whole, target, plan.target)
    for other in weights_of[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights_of[0], other, strict=True))
