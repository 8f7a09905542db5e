"""Importance of experts and their neurons against a naive float64 reference, under every layout."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.layers import shard_positions
from megatron_ext.pruning.aggregation import Aggregation
from megatron_ext.pruning.importance import Importance
from megatron_ext.pruning.scores import lengths
from megatron_ext.runtime import platform
from megatron_ext.training.step import StepShape, Wrapped, evaluate
from tests.models import MIXTRAL, MOE, random_batch
from tests.ranks import run_ranks
from tests.test_importance import CP2, PP2, TP2, aggregated, part

KINDS = ("mean", "l2", "var")
SETTINGS = [Aggregation(batch=batch, sequence=sequence) for batch in KINDS for sequence in KINDS]
SETTINGS += [Aggregation(neurons="pre"), Aggregation("var", "var", "pre", "aggregate-first")]
EP2 = {"expert_model_parallel_size": 2}
SEQ_LENGTH, NUM_SAMPLES = 16, 4


# Naive reference: routing and experts are computed again from the input of each layer's MLP.


def capture_mlps(arch):
    """Return (input [S, n, H], weights) of each layer's MLP of a serial run, float64."""
    groups = platform.initialize().groups
    (model,) = build_model(arch, ModelOptions(), groups, seed=7)
    seen = []
    for layer in model.decoder.layers:
        layer.mlp.register_forward_pre_hook(
            lambda mlp, args: seen.append(
                (args[0].detach().double(), {k: v.double() for k, v in mlp.named_parameters()})
            )
        )
    batch = random_batch(arch, num_samples=NUM_SAMPLES, seq_length=SEQ_LENGTH)
    model.eval()
    with torch.no_grad():
        model(batch["tokens"], batch["position_ids"], None)
    return [(x, {k: v.detach() for k, v in weights.items()}) for x, weights in seen]


def probabilities(x, router, arch):
    """Return [S, n, E], 0 where a position is not routed to an expert."""
    logits = x @ router.T
    if arch.moe_router_pre_softmax:
        values, chosen = logits.softmax(-1).topk(arch.moe_router_topk, dim=-1)
    else:
        values, chosen = logits.topk(arch.moe_router_topk, dim=-1)
        values = values.softmax(-1)
    return torch.zeros_like(logits).scatter(-1, chosen, values)


def neurons_of(x, fc1, arch):
    """Return (before, after) the activation function."""
    y = x @ fc1.T
    if not arch.swiglu:
        return y, F.gelu(y)
    gate, up = y.chunk(2, dim=-1)
    return gate, F.silu(gate) * up


def reference(mlps, arch, aggregation, mask):
    kept = mask.numpy() != 0  # [S, n]

    def scores(x):
        samples = [x.numpy()[kept[:, n], n] for n in range(NUM_SAMPLES) if kept[:, n].any()]
        per_sample = np.stack([aggregated(aggregation.sequence, y) for y in samples])
        return aggregated(aggregation.batch, per_sample)

    is_pre, vectors = aggregation.neurons == "pre", {}
    for number, (x, weights) in enumerate(mlps):
        outputs = []
        probs = probabilities(x, weights["router.weight"], arch).unsqueeze(-1)  # [S, n, E, 1]
        for expert in range(arch.num_experts):
            prefix = f"experts.local_experts.{expert}"
            before, after = neurons_of(x, weights[f"{prefix}.linear_fc1.weight"], arch)
            after = after * probs[:, :, expert]
            neurons = before * (probs[:, :, expert] > 0) if is_pre else after
            vectors[f"moe_ffn.{number}.{expert}"] = scores(neurons)
            outputs.append((after @ weights[f"{prefix}.linear_fc2.weight"].T).norm(dim=-1))
        vectors[f"experts.{number}"] = scores(torch.stack(outputs, dim=-1))
        if arch.moe_shared_expert_intermediate_size is not None:
            before, after = neurons_of(x, weights["shared_experts.linear_fc1.weight"], arch)
            vectors[f"shared_ffn.{number}"] = scores(before if is_pre else after)
    return vectors


def score_model(arch, layout, options, micro_batch_size):
    """Return the scores of all ``SETTINGS``, from one run."""
    groups, options = platform.initialize(**layout).groups, ModelOptions(**options)
    chunks = build_model(arch, options, groups, seed=7)
    importances = [
        Importance(
            chunks, arch, groups, sequence_parallel=options.sequence_parallel, aggregation=how
        )
        for how in SETTINGS
    ]
    batch = random_batch(arch, num_samples=NUM_SAMPLES, seq_length=SEQ_LENGTH)
    positions = shard_positions(SEQ_LENGTH // groups.cp.size(), groups.cp, groups.cp.rank())
    mine = {key: part(x, 0, groups.dp)[:, positions] for key, x in batch.items()}
    split = {key: x.split(micro_batch_size) for key, x in mine.items()}
    batches = [dict(zip(split, parts, strict=True)) for parts in zip(*split.values(), strict=True)]
    shape = StepShape(
        num_microbatches=len(batches), micro_batch_size=micro_batch_size, seq_length=SEQ_LENGTH
    )

    def announced():
        for one in batches:
            for importance in importances:
                importance.expect(one["loss_mask"])
            yield one

    handles = [importance.attached() for importance in importances]
    for handle in handles:
        handle.__enter__()
    wrapped = Wrapped(model=chunks, groups=groups)
    evaluate(wrapped, [announced() for _ in chunks], shape, ["lm loss"])
    for handle in handles:
        handle.__exit__(None, None, None)
    return [importance.collect() for importance in importances]


@pytest.fixture(scope="module")
def expected():
    def of(arch):
        mlps = run_ranks(1, capture_mlps, arch)[0]
        batch = random_batch(arch, num_samples=NUM_SAMPLES, seq_length=SEQ_LENGTH)
        return [reference(mlps, arch, how, batch["loss_mask"].T) for how in SETTINGS]

    return {arch: of(arch) for arch in (MOE, MIXTRAL)}


@pytest.mark.parametrize(
    ("arch", "world_size", "layout", "options", "micro_batch_size"),
    [
        (MOE, 1, {}, {}, 4),
        (MIXTRAL, 1, {}, {}, 1),
        (MOE, 2, {}, {}, 2),
        (MOE, 2, EP2, {}, 1),
        (MIXTRAL, 2, EP2, {}, 2),
        (MOE, 2, CP2, {}, 2),
        (MIXTRAL, 2, CP2 | EP2, {}, 4),
        (MOE, 2, PP2, {}, 2),
        (MOE, 2, TP2, {"sequence_parallel": True}, 2),
        (MIXTRAL, 4, TP2 | EP2, {"sequence_parallel": True}, 1),
        (MOE, 4, {"context_parallel_size": 4} | EP2, {}, 2),
    ],
)
def test_scores_of_experts(arch, world_size, layout, options, micro_batch_size, expected):
    results = run_ranks(world_size, score_model, arch, layout, options, micro_batch_size)
    for number, theirs in enumerate(expected[arch]):
        ours = results[0][number]
        assert {name: len(vector) for name, vector in ours.items()} == lengths(arch)
        for name, vector in theirs.items():
            # Rounding of the model's float32 forward pass, beside the largest score of the vector.
            np.testing.assert_allclose(
                ours[name].numpy(),
                vector,
                rtol=1e-4,
                atol=2e-6 * float(np.abs(vector).max()),
                err_msg=f"{SETTINGS[number]} {name}",
            )
        for other in results:
            assert all(torch.equal(other[number][name], ours[name]) for name in ours)
