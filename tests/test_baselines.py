"""Scores without activations: naive references, every layout, and units as trimming sees them."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ext.arch import dim_sizes
from megatron_ext.arch.axes import axes_of
from megatron_ext.checkpoint import checkpoints
from megatron_ext.checkpoint.slices import SliceReader
from megatron_ext.pruning.baselines import magnitude_scores, random_scores
from megatron_ext.pruning.kept import kept_indices, units_on
from megatron_ext.pruning.planner import make_plan
from megatron_ext.pruning.scores import Scores
from megatron_ext.pruning.scores_file import check_scores, load_scores
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import CHECKPOINT
from tests.models import BERT, GPT2, LLAMA, MOE, NEMOTRON
from tests.programs import fail, read_tensors, succeed, write_model
from tests.ranks import run_ranks

MODELS = {"llama": LLAMA, "gpt2": GPT2, "nemotron": NEMOTRON, "bert": BERT, "moe": MOE}
LAYERS = r"(?:de|en)coder\.layers\."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in MODELS}
    for name, arch in MODELS.items():
        write_model(folders[name], arch)
    return folders


def naive_magnitude(folder, arch):
    """Sum squares unit by unit, from what the units are and not from the table of dims."""
    w = {key: x.double().numpy() for key, x in read_tensors(folder).items()}
    for key in w:
        if arch.apply_layernorm_1p and "norm" in key and key.endswith("weight"):
            w[key] = w[key] + 1
    w.pop("output_layer.bias", None)  # of tokens
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if key in w:
            w[key] = w[key][: arch.vocab_size]
    width, groups = arch.kv_channels, arch.num_query_groups
    per_group = arch.num_attention_heads // groups
    norms = ("final_layernorm.", "layer_norm_", "pre_mlp_layernorm.")
    columns = ("word_embeddings.", "position_embeddings.", "output_layer.", "linear_qkv.weight")
    columns += (
        "router.weight",
        "tokentype_embeddings.",
        "lm_head.layer_norm.",
        "lm_head.dense.bias",
    )
    hidden = np.zeros(arch.hidden_size)
    for key, x in w.items():
        if key.endswith("linear_fc1.weight") or any(part in key for part in (*columns, *norms)):
            hidden += (x**2).reshape(-1, arch.hidden_size).sum(axis=0)
        elif key == "lm_head.dense.weight":
            hidden += [
                (x[i] ** 2).sum() + (x[:, i] ** 2).sum() - x[i, i] ** 2 for i in range(len(x))
            ]
        elif "linear_proj." in key or "linear_fc2." in key:  # of each layer, and of each expert
            count = arch.num_layers * (arch.num_experts if "mlp.experts." in key else 1)
            hidden += (x.reshape(count, arch.hidden_size, -1) ** 2).sum(axis=(0, 2))
    scores = {"hidden": np.sqrt(hidden), "layers": np.zeros(arch.num_layers)}
    for n in range(arch.num_layers):
        layer = {re.sub(LAYERS, "", key): x[n] for key, x in w.items() if re.match(LAYERS, key)}
        scores["layers"][n] = np.sqrt(sum((x**2).sum() for x in layer.values()))
        scores |= naive_neurons(layer, n, arch)
        qkv = [
            x.reshape(groups, per_group + 2, width, -1)
            for x in (layer.get(f"self_attention.linear_qkv.{x}") for x in ("weight", "bias"))
            if x is not None
        ]
        proj = layer["self_attention.linear_proj.weight"]
        heads = []
        for head in range(arch.num_attention_heads):
            group, place = divmod(head, per_group)
            blocks = [place] if per_group > 1 else [0, 1, 2]
            outs = proj[:, head * width : (head + 1) * width]
            heads.append((outs**2).sum() + sum((x[group, blocks] ** 2).sum() for x in qkv))
        scores |= {f"heads.{n}": np.sqrt(heads)}
    return scores


def naive_neurons(layer, number, arch):
    def neurons(fc1, fc2, width):
        """Sum squares of the rows of ``fc1``, in one block or two, and of the columns of fc2."""
        sums = [(fc2[:, f] ** 2).sum() for f in range(width)]
        for x in fc1:
            for f in range(width):
                sums[f] += (x[f::width] ** 2).sum()
        return np.sqrt(sums)

    if arch.num_experts is None:
        names = ("mlp.linear_fc1.weight", "mlp.linear_fc1.bias")
        fc1 = [layer[name] for name in names if name in layer]
        fc2 = layer["mlp.linear_fc2.weight"]
        return {f"ffn.{number}": neurons(fc1, fc2, arch.ffn_hidden_size)}
    shared = [layer[f"mlp.shared_experts.linear_fc{i}.weight"] for i in (1, 2)]
    width = arch.moe_shared_expert_intermediate_size
    scores = {f"shared_ffn.{number}": neurons(shared[:1], shared[1], width)}
    whole = []
    for expert, router in enumerate(layer["mlp.router.weight"]):
        fc1, fc2 = (layer[f"mlp.experts.experts.linear_fc{i}.weight"][expert] for i in (1, 2))
        name = f"moe_ffn.{number}.{expert}"
        scores[name] = neurons([fc1], fc2, arch.moe_ffn_hidden_size)
        whole.append((fc1**2).sum() + (fc2**2).sum() + (router**2).sum())
    return {**scores, f"experts.{number}": np.sqrt(whole)}


def magnitude(folder, layout):
    place = platform.initialize(**layout)
    source = checkpoints.read(folder)
    return magnitude_scores(SliceReader(source.folder), source.arch, place.device)


@pytest.mark.parametrize("name", MODELS)
def test_magnitude_is_the_norm_of_a_units_weights(name, folders):
    expected = naive_magnitude(folders[name], MODELS[name])
    (vectors,) = run_ranks(1, magnitude, folders[name], {})
    assert vectors.keys() == expected.keys()
    for unit, vector in vectors.items():
        np.testing.assert_allclose(vector.numpy(), expected[unit], rtol=1e-6, err_msg=unit)
    scores = Scores(vectors=vectors, source=MODELS[name], aggregation="", samples=0, seq_length=0)
    check_scores(scores, MODELS[name])


def test_magnitude_does_not_depend_on_ranks(folders):
    (serial,) = run_ranks(1, magnitude, folders["llama"], {})
    for vectors in run_ranks(3, magnitude, folders["llama"], {}):
        assert all(torch.equal(vectors[name], serial[name]) for name in serial)


@pytest.mark.parametrize("name", MODELS)
def test_a_unit_is_what_trimming_takes(name):
    arch = MODELS[name]
    everything = make_plan(None, arch, arch)
    on_dims = [(dim, *on_dim) for dim in dim_sizes(arch) for on_dim in units_on(dim, arch)]
    assert {axis.name for _, axis, *_ in on_dims} == {a.name for a in axes_of(arch)} - {"layers"}
    for dim, axis, _, units in on_dims:
        assert len(units) == dim_sizes(arch)[dim]
        for unit in range(axis.length(arch)):
            left = tuple(i for i in range(axis.length(arch)) if i != unit)
            plan = replace(everything, kept={**everything.kept, axis.vector(2, 1): left})
            assert torch.equal(kept_indices(plan, dim, 2, 1), torch.where(units != unit)[0])


def test_random_scores_differ_between_vectors_and_seeds_only():
    vectors, again, other = (random_scores(LLAMA, seed) for seed in (1, 1, 2))
    assert all(torch.equal(vectors[name], again[name]) for name in vectors)
    drawn = [tuple(x[name][:4].tolist()) for x in (vectors, other) for name in vectors]
    assert len(set(drawn)) == len(drawn)
    assert all(x.min() >= 0 and x.max() < 1 for x in vectors.values())
    check_scores(
        Scores(vectors=vectors, source=LLAMA, aggregation="", samples=0, seq_length=0), LLAMA
    )


# As a user runs them: no data.


@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_pruning_without_data(importance, folders, tmp_path):
    plans = []
    for number, layout in enumerate(([], ["--tensor-model-parallel-size", "2"])):
        scores, plan = str(tmp_path / f"s{number}"), str(tmp_path / f"p{number}")
        argv = ["--load", folders["llama"], "--seq-length", "16", "--micro-batch-size", "1"]
        argv += ["--importance", importance, "--target-ffn-hidden-size", "40", *layout]
        argv += ["--target-hidden-size", "32", "--target-num-layers", "3"]
        succeed("prune", [*argv, "--scores", scores, "--plan", plan], 1 + number)
        plans.append(Path(plan).read_text())
        made = load_scores(scores)
        assert made.aggregation == importance + ",seed=1234" * (importance == "random")
        assert (made.samples, made.seq_length, made.depth) == (0, 0, importance)
    assert plans[0] == plans[1]
    # The file's settings win over others, and this is said once.
    outcomes = succeed("prune", [*argv, "--seed", "5", "--scores", scores, "--plan", plan + "2"], 2)
    notes = [
        outcome.stdout.count(f"NOTE: the settings of --scores {scores} hold")
        for outcome in outcomes
    ]
    assert notes == ([1, 0] if importance == "random" else [0, 0])


def spoil(model):
    model.decoder.layers[1].mlp.linear_fc2.weight[3, 5] = float("nan")


def test_weights_that_are_not_finite(tmp_path):
    write_model(str(tmp_path / "nan"), LLAMA, spoil)
    argv = ["--load", str(tmp_path / "nan"), "--seq-length", "16", "--micro-batch-size", "1"]
    argv += ["--importance", "magnitude", "--scores", str(tmp_path / "scores")]
    code, message = fail("prune", argv, 2)
    assert code == CHECKPOINT
    assert str(tmp_path / "nan") in message
    assert "decoder.layers.mlp.linear_fc2.weight of layer 1" in message
    assert not (tmp_path / "scores").exists()
