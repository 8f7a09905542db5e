"""Estimates against counts by hand, published formulas and what runs really allocate."""

import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer import ChainedOptimizer

from megatron_ext.cli.fit import check_layout, virtual_pipeline_size
from megatron_ext.cli.programs import parse_train
from megatron_ext.distillation.fused import CHUNK_TOKENS
from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.rehearsal import cost_report as report
from megatron_ext.rehearsal.cost import (
    FUSED_TOKENS,
    Layout,
    Placed,
    in_flight,
    kept_bytes,
    layer_bytes,
    logits_bytes,
    memory,
    rank_memory,
    rank_parameters,
)
from megatron_ext.rehearsal.speed import bubble, step_seconds
from megatron_ext.runtime import platform
from megatron_ext.runtime.gpus import GPUS, Gpu
from megatron_ext.training import state
from tests.models import GPT2, LLAMA, MIXTRAL, MOE, NEMOTRON, random_batch
from tests.ranks import run_ranks

LLAMA_8B = replace(
    LLAMA,
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    max_position_embeddings=131072,
    vocab_size=128256,
    padded_vocab_size=128256,
)
LLAMA_4B = replace(LLAMA_8B, hidden_size=3072, ffn_hidden_size=9216)
ONE = Layout(world_size=1, seq_length=8192)


def test_llama_8b_to_4b_on_one_gpu():
    """8192 tokens a step in bf16, each figure counted by hand."""
    needs = memory(Placed(LLAMA_4B, (32,)), Placed(LLAMA_8B, (32,)), ONE)
    student, teacher, tokens = 4_512_746_496, 8_030_261_248, 8192
    assert needs["weights"] == 2 * student
    assert needs["gradients"] == 4 * student
    assert needs["optimizer"] == 12 * student
    assert needs["teacher weights"] == 2 * teacher
    assert needs["logits"] == 2 * tokens * 128256 * 2
    assert needs["gradient of logits"] == tokens * 128256 * 2
    # Norms 4 x 3072; queries, keys, values 6144; attention 4096; gate and up 18432; product 9216.
    layer = 2 * tokens * (4 * 3072 + 6144 + 4096 + 18432 + 9216)
    assert needs["activations"] == 32 * layer + 2 * tokens * 2 * 3072
    assert needs["teacher activations"] == 2 * tokens * (4 * 4096 + 6144 + 4096 + 28672 + 14336)


def test_time_of_llama_8b_to_4b():
    """1 s at 1 TFLOP/s is 1e12 operations: matrices, half of the attention square, the output."""
    layers = 3072 * 6144 + 4096 * 3072 + 3072 * 18432 + 9216 * 3072
    student = 2 * (32 * (layers + 4096 * 8192) + 3072 * 128256)
    layers = 4096 * 6144 + 4096 * 4096 + 4096 * 28672 + 14336 * 4096
    teacher = 2 * (32 * (layers + 4096 * 8192) + 4096 * 128256)
    models = Placed(LLAMA_4B, (32,)), Placed(LLAMA_8B, (32,))
    slow = Gpu(0, 1.0, None)
    found = step_seconds(*models, ONE, slow, 0.5)
    assert found == pytest.approx(2 * 8192 * (3 * student + teacher) / 1e12)
    # FP8 halves the linear layers and leaves the output layer and attention.
    kept = 2 * (32 * 4096 * 8192 * 4 + 128256 * (3 * 3072 + 4096))
    both = replace(ONE, fp8=True, teacher_fp8=True)
    found = step_seconds(*models, both, Gpu(0, 1.0, 2.0), 1.0)
    assert found == pytest.approx(8192 * (kept + (3 * student + teacher - kept) / 2) / 1e12)
    kept = 2 * (32 * 4096 * 8192 * 3 + 128256 * 3 * 3072)
    found = step_seconds(*models, replace(ONE, fp8=True), Gpu(0, 1.0, 2.0), 1.0)
    assert found == pytest.approx(8192 * (kept + teacher + (3 * student - kept) / 2) / 1e12)
    assert step_seconds(*models, both, GPUS["A100"], 1) == pytest.approx(
        step_seconds(*models, ONE, GPUS["A100"], 1)
    )


@pytest.mark.parametrize("t", [1, 4])
def test_activations_of_gpt_are_those_of_the_paper(t):
    """Korthikanti et al. 2022, Table 2, with recomputed scores, for h = heads and an MLP of 4 h."""
    h = 64
    arch = replace(
        GPT2,
        hidden_size=h,
        ffn_hidden_size=4 * h,
        num_attention_heads=8,
        num_query_groups=8,
        kv_channels=8,
        hidden_dropout=0.1,
    )
    layout = Layout(world_size=t, tensor_model_parallel_size=t, seq_length=24, micro_batch_size=3)
    sbh = 24 * 3 * h
    assert layer_bytes(arch, layout) == sbh * (10 + 24 / t)
    assert layer_bytes(arch, replace(layout, sequence_parallel=True)) == sbh * 34 / t


@pytest.mark.parametrize(
    ("own", "teacher", "expected"),
    [
        (None, None, (False, False)),
        ("hybrid", None, (True, True)),
        ("hybrid", "none", (True, False)),
        (None, "e4m3", (False, True)),
    ],
)
def test_which_model_computes_in_fp8(own, teacher, expected):
    flags = SimpleNamespace(**vars(flags_of(LLAMA, "", 1)))
    flags.fp8 = SimpleNamespace(fp8_format=own, teacher_fp8_format=teacher)
    layout = report.train_layout(flags, 1)
    assert (layout.fp8, layout.teacher_fp8) == expected


def test_recomputation():
    each, only_input = layer_bytes(LLAMA_4B, ONE), 2 * 8192 * 3072

    def kept(method, number):
        layout = replace(
            ONE,
            recompute_granularity="full",
            recompute_method=method,
            recompute_num_layers=number,
        )
        return kept_bytes(LLAMA_4B, layout, 32)

    assert kept("uniform", 1) == (32 * only_input, each)
    assert kept("uniform", 5) == (7 * only_input, 5 * each)
    assert kept("block", 30) == (30 * only_input + 2 * each, each)
    layout = replace(ONE, recompute_granularity="selective")
    assert kept_bytes(LLAMA_4B, layout, 32) == (32 * each, 0)
    student = Placed(LLAMA_4B, (32,))
    plain, half, all_again = (
        step_seconds(student, None, layout, GPUS["H100"], 1)
        for layout in (
            ONE,
            replace(
                ONE,
                recompute_granularity="full",
                recompute_method="block",
                recompute_num_layers=16,
            ),
            replace(
                ONE,
                recompute_granularity="full",
                recompute_method="uniform",
                recompute_num_layers=1,
            ),
        )
    )
    assert half - plain == pytest.approx((all_again - plain) / 2)
    assert 1.3 < all_again / plain < 4 / 3


@pytest.mark.parametrize(
    ("arch", "modules", "elements"),
    [
        (LLAMA_4B, ("core_attn",), 0),
        (LLAMA_4B, ("mlp",), 3 * LLAMA_4B.ffn_hidden_size),
        (LLAMA_4B, ("mlp", "layernorm"), 3 * LLAMA_4B.ffn_hidden_size + 2 * LLAMA_4B.hidden_size),
        (MOE, ("moe_act",), 2 * 22),
        (MOE, ("moe",), 2 * (2 * 24 + 3 * 22) + 3 * 14),
    ],
)
def test_modules_that_are_computed_again_keep_nothing(arch, modules, elements):
    layout = replace(ONE, recompute_granularity="selective", recompute_modules=modules)
    each, again = layer_bytes(arch, ONE), elements * layout.tokens * layout.param_bytes
    assert kept_bytes(arch, layout, 3) == pytest.approx((3 * (each - again), again))


def test_recomputed_mlps_cost_their_share_of_a_layer():
    student, layout = Placed(LLAMA_4B, (32,)), replace(ONE, recompute_granularity="selective")
    mlp = step_seconds(student, None, replace(layout, recompute_modules=("mlp",)), GPUS["H100"], 1)
    uniform = {"recompute_granularity": "full", "recompute_method": "uniform"}
    whole = replace(ONE, **uniform, recompute_num_layers=1)
    plain, full = (step_seconds(student, None, x, GPUS["H100"], 1) for x in (ONE, whole))
    assert 0.5 < (mlp - plain) / (full - plain) < 0.8


def test_micro_batches_in_flight_are_megatrons():
    """The theoretical memory report of Megatron-LM counts p (1 + (p - 1) / (p v)) on stage 0."""
    layout = Layout(
        world_size=4, pipeline_model_parallel_size=4, seq_length=8, global_batch_size=64
    )
    assert [in_flight(layout, 1, rank) for rank in range(4)] == [4, 3, 2, 1]
    for pieces in (2, 3):
        found = in_flight(layout, pieces, 0) / pieces  # in micro-batches of all pieces
        assert found == pytest.approx(4 * (1 + 3 / (4 * pieces)))
    assert in_flight(replace(layout, global_batch_size=2), 1, 0) == 2
    assert bubble(layout, 8) == 3 / (2 * 64)


def test_logits():
    layout = Layout(world_size=2, tensor_model_parallel_size=2, seq_length=4096)
    columns = LLAMA_8B.padded_vocab_size // 2
    elements = 4096 * columns
    assert sum(logits_bytes(LLAMA_8B, None, layout).values()) == 6 * elements
    wide = replace(layout, param_bytes=4)
    assert sum(logits_bytes(LLAMA_8B, None, wide).values()) == 4 * elements
    assert sum(logits_bytes(LLAMA_8B, LLAMA_8B, wide).values()) == 12 * elements
    both = replace(layout, lm_loss=True)
    assert sum(logits_bytes(LLAMA_8B, LLAMA_8B, both).values()) == 10 * elements
    stored = replace(layout, stored_teacher=True)
    assert sum(logits_bytes(LLAMA_8B, None, stored).values()) == 4 * elements
    assert CHUNK_TOKENS["cuda"] == FUSED_TOKENS
    fused = logits_bytes(LLAMA_8B, LLAMA_8B, replace(layout, fused_output=True))
    assert fused == {
        "logits": 1024 * columns * 6,
        "gradients of outputs": 4 * 4096 * (4096 + columns),
    }


def test_the_fullest_rank_of_a_pipeline():
    """The first stage keeps most micro-batches, the last one holds the logits."""
    layout = Layout(
        world_size=4, pipeline_model_parallel_size=4, seq_length=8192, global_batch_size=64
    )
    models = Placed(LLAMA_4B, (8,) * 4), Placed(LLAMA_8B, (8,) * 4)
    each = [rank_memory(*models, layout, rank) for rank in range(4)]
    assert max(each, key=lambda needs: sum(needs.values())) == memory(*models, layout)
    assert [("logits" in needs) for needs in each] == [False, False, False, True]
    assert each[0]["activations"] > each[1]["activations"] > each[2]["activations"]
    # A heavy last stage sets the pace.
    even = step_seconds(*models, layout, GPUS["H100"], 1)
    uneven = Placed(LLAMA_4B, (7, 7, 7, 11)), models[1]
    assert step_seconds(*uneven, layout, GPUS["H100"], 1) > 1.15 * even


# Against what ranks build and allocate.

LAYOUTS = {
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "TP2xPP2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "VPP2": (
        2,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
        "--global-batch-size 2",
    ),
    "uneven": (
        2,
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*3|tL",
    ),
    "EP2": (2, "--expert-model-parallel-size 2"),
    "EP2xTP2": (
        4,
        "--expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
    ),
}


def flags_of(arch, extra, world_size):
    line = (
        "--load x --mock-data --tokenizer-type NullTokenizer --vocab-size 9 --micro-batch-size 1 "
        f"--seq-length 16 --train-iters 1 --lr 1e-3 {extra}"
    )
    flags = parse_train(shlex.split(line), world_size)
    check_layout(arch, flags.parallel, seq_length=16)
    return flags


def _build(arch, flags, dtype=torch.float32):
    parallel = flags.parallel
    pieces = virtual_pipeline_size(parallel, arch.num_layers)
    groups = platform.initialize(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=pieces,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
    ).groups
    options = ModelOptions(
        params_dtype=dtype,
        sequence_parallel=parallel.sequence_parallel,
        virtual_pipeline_model_parallel_size=pieces,
        pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
        overlap_p2p_comm=bool(pieces),
    )
    return groups, build_model(arch, options, groups, seed=1)


def _count(arch, flags):
    groups, chunks = _build(arch, flags)
    counts = [0, 0]
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            counts[".experts." not in name or "shared" in name] += parameter.numel()
    return groups.pp.rank(), tuple(counts)


ARCHS = {"llama": LLAMA, "gpt2": GPT2, "nemotron": NEMOTRON, "moe": MOE, "mixtral": MIXTRAL}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", "TP2xPP2"),
        ("llama", "VPP2"),
        ("llama", "uneven"),
        ("gpt2", "TP2"),
        ("gpt2", "PP2"),  # tied: the last stage has a copy of the embedding
        ("nemotron", "TP2"),
        ("moe", "EP2xTP2"),
        ("mixtral", "EP2"),
        ("mixtral", "PP2"),
    ],
)
def test_parameters_of_every_rank(name, layout):
    arch, (world_size, extra) = ARCHS[name], LAYOUTS[layout]
    flags = flags_of(arch, extra, world_size)
    model = report.placed(arch, flags.parallel)
    sizes = report.train_layout(flags, world_size)
    for rank, counts in run_ranks(world_size, _count, arch, flags):
        assert rank_parameters(model, sizes, rank) == counts


def _allocated(arch, flags):
    """Return bytes of weights, gradient buffers and optimizer state after a step."""
    dtype = torch.bfloat16 if flags.precision.bf16 else torch.float32
    groups, chunks = _build(arch, flags, dtype)
    run = state.make_run(
        flags, arch, groups, chunks, chunks, objective={}, eval_losses=(), flops_per_token=0
    )
    for chunk in run.model:
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(1e-3)
    run.optimizer.step()
    weights = sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters())
    grads = sum(
        buffer.grad_data.numel() * buffer.grad_data.element_size()
        for chunk in run.model
        for buffer in chunk.buffers + chunk.expert_parallel_buffers
    )
    parts = run.optimizer
    parts = parts.chained_optimizers if isinstance(parts, ChainedOptimizer) else [parts]
    held = {}
    for part in parts:
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                # The optimizer's own copies; a float32 weight is no copy.
                if dtype != torch.float32:
                    held[main.data_ptr()] = main.numel() * 4
                for x in part.optimizer.state[main].values():
                    if torch.is_tensor(x) and x.ndim:
                        held[x.data_ptr()] = x.numel() * x.element_size()
    return groups.pp.rank(), weights, grads, sum(held.values())


@pytest.mark.parametrize(
    ("extra", "world_size", "padded"),
    [
        ("", 1, False),
        ("--bf16", 1, False),
        ("--bf16 --grad-reduce-in-bf16", 1, False),
        ("--bf16 --optimizer sgd --sgd-momentum 0", 1, False),
        ("--bf16 --pipeline-model-parallel-size 2", 2, False),
        ("--bf16 --use-distributed-optimizer", 2, True),
        ("--bf16 --use-distributed-optimizer --tensor-model-parallel-size 2", 4, True),
    ],
)
@pytest.mark.parametrize("arch", [LLAMA, MOE], ids=["llama", "moe"])
def test_what_a_run_allocates(extra, world_size, padded, arch):
    """Weights, gradients and optimizer state, to the byte but for the buffers' padding."""
    if arch.num_experts:
        extra += " --sequence-parallel"
        extra += " --expert-model-parallel-size 2" if padded else ""
    flags = flags_of(arch, extra, world_size)
    model = report.placed(arch, flags.parallel)
    layout = report.train_layout(flags, world_size)
    found = run_ranks(world_size, _allocated, arch, flags)
    for rank, weights, grads, held in found:
        needs = rank_memory(model, None, layout, rank)
        assert weights == needs["weights"]
        if padded:  # each weight begins at a multiple of 64 elements, a bucket ends at one of 128
            assert needs["gradients"] <= grads <= 1.05 * needs["gradients"] + 4 * 2**16
        else:
            assert grads == needs["gradients"]
            assert held == needs["optimizer"]
    if padded:  # which rank holds which weights is the buffers' business
        total = sum(held for *_, held in found)
        layout_total = sum(
            rank_memory(model, None, layout, rank)["optimizer"] for rank, *_ in found
        )
        assert total == pytest.approx(layout_total, rel=1e-3)


def _kept_for_backward(arch, num_samples):
    """Return the bytes that the layers of a bf16 model keep, weights and norms' ends left out."""
    groups = platform.initialize().groups
    options = ModelOptions(params_dtype=torch.bfloat16)
    totals = []
    for num_layers in (1, 3):
        (model,) = build_model(replace(arch, num_layers=num_layers), options, groups, seed=1)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def keep(tensor, own=own, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes(), tensor  # alive: no address twice
            return tensor

        batch = random_batch(arch, num_samples=num_samples, seq_length=32)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(batch["tokens"], batch["position_ids"], None)
        totals.append(sum(size for size, _ in kept.values()))
        del output
    return (totals[1] - totals[0]) / 2


def test_what_a_layer_keeps():
    """The estimate, and what a CPU keeps beside it, to the byte."""
    arch, samples, tokens = LLAMA, 2, 2 * 32
    layout = Layout(world_size=1, seq_length=32, micro_batch_size=samples)
    (found,) = run_ranks(1, _kept_for_backward, arch, samples)
    heads, keys = 4 * 16, 2 * 16
    beside = {
        "norms in float32: input and normalised instead of the input, a factor per token": 2
        * tokens
        * (2 * 4 * 48 - 2 * 48 + 4),
        "SiLU of the gate, and the gate again": 2 * tokens * 2 * 80,
        "rotated queries and keys beside the whole projection": 2 * tokens * (heads + keys),
        "sines and cosines of queries and of keys, one for all samples": 4 * 2 * 32 * 16,
        "log-sum-exp of the scores, float32": 4 * tokens * 4,
    }
    assert found == layer_bytes(arch, layout) + sum(beside.values())
