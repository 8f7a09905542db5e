"""Depth scores against models that are rebuilt without the layers, for every layout.

The reference builds a smaller model from the weights of the layers that stay, for every choice of
them, and computes losses, KL and cosines itself, in float64. megatron-core's cross entropy computes
in float32 whatever it is given, and cosines are taken in float32.
"""

import itertools

import pytest
import torch
from torch.utils.data import Dataset

from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.pruning.calibrate import Passes, calibrate
from megatron_ext.pruning.depth import contiguous, score_blocks, score_depth, skipped
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import UserError
from tests.models import GPT2, LLAMA, MOE, random_batch
from tests.ranks import run_ranks
from tests.test_trim import output_matrices

NUM_SAMPLES, SEQ_LENGTH, NUM_LAYERS = 4, 16, 4
TOLERANCE = {"block": 1e-6, "loss": 1e-5, "kl": 1e-9}


class Samples(Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["tokens"])

    def __getitem__(self, index):
        return {name: x[index] for name, x in self.batch.items()}


def batch_of(arch):
    return random_batch(arch, num_samples=NUM_SAMPLES, seq_length=SEQ_LENGTH)


# Naive reference, on one rank.


def smaller_models(arch):
    """Return {layers that are left out: (loss, kl, 1 - cos between any two hidden states)}."""
    groups = platform.initialize().groups
    options = ModelOptions(params_dtype=torch.float64)
    (whole,) = build_model(arch, options, groups, seed=7)
    batch = batch_of(arch)
    teacher = run_naively(whole, batch)[0][..., : arch.vocab_size].log_softmax(-1)
    found = {}
    for count in range(NUM_LAYERS):
        for left_out in itertools.combinations(range(NUM_LAYERS), count):
            kept = [layer for layer in range(NUM_LAYERS) if layer not in left_out]
            (model,) = build_model(replace_layers(arch, len(kept)), options, groups)
            model.load_state_dict(renumbered(whole.state_dict(), kept))
            found[left_out] = measured(arch, batch, teacher, *run_naively(model, batch))
    return found


def replace_layers(arch, count):
    return type(arch)(**{**vars(arch), "num_layers": count})


def renumbered(state, kept):
    prefix, result = "decoder.layers.", {}
    for name, value in state.items():
        if name.startswith(prefix):
            number, rest = name.removeprefix(prefix).split(".", 1)
            if int(number) not in kept:
                continue
            name = f"{prefix}{kept.index(int(number))}.{rest}"
        result[name] = value
    return result


@torch.no_grad()
def run_naively(model, batch):
    """Return logits [b, s, v] and the residual stream before and after every layer, [b, s, H]."""
    model.eval()
    states = []
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: states.append(kwargs["hidden_states"].clone()), with_kwargs=True
        )
    model.decoder.final_layernorm.register_forward_pre_hook(
        lambda _, args: states.append(args[0].clone())
    )
    logits = model(batch["tokens"], batch["position_ids"], None)
    return logits.transpose(0, 1), [x.transpose(0, 1) for x in states]


def measured(arch, batch, teacher, logits, states):
    mask = batch["loss_mask"].double()

    def mean(x):
        return ((x * mask).sum() / mask.sum()).item()

    student = logits[..., : arch.vocab_size].log_softmax(-1)
    loss = -student.gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1)
    kl = (teacher.exp() * (teacher - student)).sum(-1)
    change = {}
    for i, j in itertools.combinations(range(len(states)), 2):
        x, y = states[i], states[j]
        change[i, j] = mean(1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)))
    return mean(loss), mean(kl), change


def expected_scores(reference, importance, block, removed):
    """Return {block of layers: score} in the model without ``removed``."""
    kept = [layer for layer in range(NUM_LAYERS) if layer not in removed]
    scores = {}
    for start in range(len(kept) - block + 1):
        layers = tuple(kept[start : start + block])
        without = tuple(sorted({*removed, *layers}))
        if importance == "block":
            scores[layers] = reference[tuple(sorted(removed))][2][start, start + block]
        else:
            scores[layers] = reference[without][("loss", "kl").index(importance)]
    return scores


def expected_order(reference, importance, block, remove):
    order = []
    while len(order) * block < remove:
        removed = [layer for layers in order for layer in layers]
        scores = expected_scores(reference, importance, block, removed)
        order.append(min(scores, key=scores.get))
    return tuple(order)


# Layouts.

CASES = [
    ("block", 1, None),
    ("block", 2, None),
    ("block", 3, None),
    ("block", 1, 3),
    ("loss", 1, None),
    ("loss", 2, None),
    ("kl", 1, None),
    ("kl", 1, 2),
    ("kl", 2, 2),
]
TP2, CP2, PP2 = (
    {f"{kind}_parallel_size": 2} for kind in ("tensor_model", "context", "pipeline_model")
)
LAYOUTS = {
    "serial": (1, {}, {}),
    "TP2+SP": (2, TP2, {"sequence_parallel": True}),
    "PP2": (2, PP2, {}),
    "PP2 uneven": (2, PP2, {"pipeline_model_parallel_layout": "Et|tttL"}),
    "PP2xVPP2": (
        2,
        PP2 | {"virtual_pipeline_model_parallel_size": 2},
        {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True},
    ),
    "CP2": (2, CP2, {}),
    "DP2": (2, {}, {}),
}


def passes_of(arch, layout, options, change=None):
    place = platform.initialize(**layout)
    options = ModelOptions(params_dtype=torch.float64, **options)
    chunks = build_model(arch, options, place.groups, seed=7)
    if change is not None:
        change(chunks)
    return Passes(
        chunks=chunks,
        arch=arch,
        dataset=Samples(batch_of(arch)),
        place=place,
        num_samples=NUM_SAMPLES,
        micro_batch_size=1,
        seq_length=SEQ_LENGTH,
        num_workers=0,
    )


def score(arch, layout, options):
    """Return the results of ``CASES`` and what is left behind in the model."""
    passes = passes_of(arch, layout, options)
    layers = [layer for chunk in passes.chunks for layer in chunk.decoder.layers]
    results = [score_depth(passes, i, block, remove=remove) for i, block, remove in CASES]
    without = {
        (importance, block): score_blocks(
            passes, importance, contiguous(NUM_LAYERS, block, (1,)), (1,)
        )
        for importance in ("block", "loss", "kl")
        for block in (1, 2)
    }
    clean = all("forward" not in vars(layer) and not layer._forward_hooks for layer in layers)
    clean &= all(chunk.training for chunk in passes.chunks)
    return results, without, calibrate(passes)["layers"], clean


@pytest.fixture(scope="module")
def reference():
    return run_ranks(1, smaller_models, LLAMA)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_models_without_the_layers(layout, reference):
    world_size, sizes, options = LAYOUTS[layout]
    ranks = run_ranks(world_size, score, LLAMA, sizes, options)
    results, without, single, clean = ranks[0]
    assert clean
    for (importance, block, remove), (vectors, order) in zip(CASES, results, strict=True):
        (vector,) = vectors.values()
        assert list(vectors) == ["layers" if block == 1 else f"layer_blocks.{block}"]
        assert (vector.dtype, len(vector)) == (torch.float32, NUM_LAYERS - block + 1)
        expected = list(expected_scores(reference, importance, block, ()).values())
        assert vector.tolist() == pytest.approx(expected, rel=1e-6, abs=TOLERANCE[importance])
        removals = remove or (block if block > 1 else 0)
        assert order == expected_order(reference, importance, block, removals)
        if (importance, block) == ("block", 1):
            torch.testing.assert_close(vector, single, rtol=1e-5, atol=1e-6)
    for (importance, block), vector in without.items():
        expected = list(expected_scores(reference, importance, block, (1,)).values())
        assert vector.tolist() == pytest.approx(expected, rel=1e-6, abs=TOLERANCE[importance])
    for others, *_ in ranks[1:]:
        for (ours, order), (theirs, other) in zip(results, others, strict=True):
            assert order == other
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_reference_can_tell_orders_apart(reference):
    """Or the orders above would hang on rounding."""
    for importance in ("block", "loss", "kl"):
        for removed in ((), *expected_order(reference, importance, 1, 1)):
            scores = sorted(expected_scores(reference, importance, 1, removed).values())
            assert scores[1] - scores[0] > 1e-4


def silence(chunks):
    """Make layer 2 hand on its input."""
    with torch.no_grad():
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                if layer.layer_number == 3:
                    for linear in (layer.self_attention.linear_proj, *output_matrices(layer.mlp)):
                        for parameter in linear.parameters():
                            parameter.zero_()


def scores_with_a_silent_layer(arch):
    passes = passes_of(arch, PP2, {}, silence)
    names = ("block", "loss", "kl")
    scores = {name: score_depth(passes, name, 1, remove=None)[0]["layers"] for name in names}
    whole = score_depth(passes, "kl", 1, remove=1)[1]
    return scores, whole


@pytest.mark.parametrize("arch", [LLAMA, GPT2, MOE], ids=["llama", "gpt2", "moe"])
def test_a_layer_that_changes_nothing_is_worth_nothing(arch):
    scores, order = run_ranks(2, scores_with_a_silent_layer, arch)[0]
    assert order == ((2,),)
    assert scores["block"][2] == pytest.approx(0, abs=1e-6)
    assert scores["kl"][2] == 0
    for name in ("block", "kl"):
        assert all(scores[name][i] > 1e-3 for i in (0, 1, 3))
    # Of loss: what the whole model has, which the layer's absence does not change.
    whole = run_ranks(1, loss_of_the_whole, arch)[0]
    assert scores["loss"][2] == pytest.approx(whole, rel=1e-6)


def loss_of_the_whole(arch):
    passes = passes_of(arch, {}, {}, silence)
    batch = batch_of(arch)
    logits, _ = run_naively(passes.chunks[0], batch)
    return measured(arch, batch, logits[..., : arch.vocab_size].log_softmax(-1), logits, [])[0]


def poison(chunks):
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            if layer.layer_number == 2:
                layer.mlp.linear_fc2.weight.data[0, 0] = float("nan")


def message_of_nan(importance):
    passes = passes_of(LLAMA, PP2, {}, poison)
    try:
        score_depth(passes, importance, 1, remove=None)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("importance", ["block", "kl"])
def test_scores_that_are_not_finite_are_an_error_on_every_rank(importance):
    messages = run_ranks(2, message_of_nan, importance)
    assert all("depth scores are NaN or infinite" in message for message in messages)


def outputs_around_an_error():
    (chunk,) = passes_of(LLAMA, {}, {}).chunks
    batch = batch_of(LLAMA)
    inputs = batch["tokens"], batch["position_ids"], None
    before = chunk.eval()(*inputs)
    between = []

    def fail_midway():
        with skipped([chunk], (1, 3)):
            between.append(chunk(*inputs))
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_midway()
    return before, between[0], chunk(*inputs)


def test_layers_come_back_also_after_an_error():
    before, between, after = run_ranks(1, outputs_around_an_error)[0]
    assert torch.equal(before, after)
    assert not torch.allclose(before, between, rtol=1e-2)


def test_blocks_are_contiguous_among_what_is_left():
    assert contiguous(4, 1, ()) == [(0,), (1,), (2,), (3,)]
    assert contiguous(6, 3, (2, 3)) == [(0, 1, 4), (1, 4, 5)]
    assert contiguous(3, 2, (0,)) == [(1, 2)]
