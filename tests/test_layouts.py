"""The layout law: loss and every gradient are the same however a model is spread over ranks.

The reference is one rank with one micro-batch, for a plain model and for a student beside its
teacher. float64 separates layout mistakes from rounding: what differs there is a bug. One thing
does round: megatron-core's cross entropy computes in float32 whatever it is given, so gradients of
the language-model loss (about 1e-3 in size here) are compared to 1e-8, those of the KL to 1e-11.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_ext.certify.compare import region, whole
from megatron_ext.checkpoint.checkpoints import sharded_tensors
from megatron_ext.distillation.losses import LogitLoss
from megatron_ext.distillation.model import Distillation, DistillationModel
from megatron_ext.model.build import build_model, model_state_dict
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.layers import shard_positions
from megatron_ext.runtime import platform
from megatron_ext.training.step import StepShape, train_step, wrap
from tests.models import BERT, GEMMA, GPT2, LLAMA, MIXTRAL, MOE, NEMOTRON, WINDOWS, random_batch
from tests.ranks import run_ranks

NUM_SAMPLES, SEQ_LENGTH = 4, 16

# name: (world size, arguments of platform.initialize, ModelOptions)
LAYOUTS = {
    "TP2": (2, {"tensor_model_parallel_size": 2}, {}),
    "TP2+SP": (2, {"tensor_model_parallel_size": 2}, {"sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}, {}),
    "PP2 uneven": (
        2,
        {"pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_layout": "Et|tttL"},
    ),
    "PP2xVPP2": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True},
    ),
    "PP2xVPP2, overlap at both ends": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {
            "virtual_pipeline_model_parallel_size": 2,
            "overlap_p2p_comm": True,
            "settings": {"overlap_p2p_comm_warmup_flush": True},
        },
    ),
    "DP2": (2, {}, {}),
    "CP2": (2, {"context_parallel_size": 2}, {}),
    "TP2xPP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, {}),
    "DP2xTP2+SP": (4, {"tensor_model_parallel_size": 2}, {"sequence_parallel": True}),
}
EP2 = {"expert_model_parallel_size": 2}
EXPERT_LAYOUTS = {
    "EP2": (2, EP2, {}),
    "EP2 all-to-all": (2, EP2, {"moe_token_dispatcher_type": "alltoall"}),
    "EP2 over CP2": (2, EP2 | {"context_parallel_size": 2}, {}),
    "EP2xPP2": (4, EP2 | {"pipeline_model_parallel_size": 2}, {}),
    "EP2xTP2+SP": (4, EP2 | {"tensor_model_parallel_size": 2}, {"sequence_parallel": True}),
    "DP4, EP2": (4, EP2, {}),
    "EP4": (4, {"expert_model_parallel_size": 4}, {}),
}


def gradients_of_one_step(arch, layout, options, teacher=None, dtype=torch.float64, **distillation):
    """Return the losses with the gradient norm, and {(key, offset): gradient} of this rank."""
    place = platform.initialize(**layout)
    groups = place.groups
    options = ModelOptions(params_dtype=dtype, **options)
    chunks = build_model(arch, options, groups, seed=7)
    trained, objective = chunks, {"lm loss": 1.0}
    if teacher is not None:
        settings = {"logit_loss": LogitLoss(temperature=2.0), "vocab_size": arch.vocab_size}
        distillation = Distillation(**settings | distillation)
        teachers = build_model(teacher, options, groups, seed=8)
        trained = [
            DistillationModel(s, t, distillation, groups.tp)
            for s, t in zip(chunks, teachers, strict=True)
        ]
        objective = distillation.objective
    wrapped = wrap(trained, DistributedDataParallelConfig(grad_reduce_in_fp32=False), groups)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="sgd", lr=0.1, params_dtype=dtype, clip_grad=0.0),
        wrapped.model,
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    batch = _share_of_batch(
        random_batch(arch, num_samples=NUM_SAMPLES, seq_length=SEQ_LENGTH), groups
    )
    micro_batches = [
        {key: x[i : i + 1] for key, x in batch.items()} for i in range(len(batch["tokens"]))
    ]
    shape = StepShape(
        num_microbatches=len(micro_batches), micro_batch_size=1, seq_length=SEQ_LENGTH
    )
    batches = [iter(micro_batches) for _ in chunks]
    losses, apply = train_step(wrapped, optimizer, batches, shape, objective)
    gradient_of = {p.data_ptr(): p.main_grad for chunk in chunks for p in chunk.parameters()}
    gradients = {}
    for shard in sharded_tensors(model_state_dict(chunks)):
        base = shard.data if shard.data._base is None else shard.data._base
        gradient = gradient_of[base.data_ptr()]
        start = shard.data.storage_offset() - base.storage_offset()
        gradient = gradient.flatten()[start : start + shard.data.numel()].view(shard.local_shape)
        gradients[shard.key, tuple(shard.global_offset)] = gradient.clone()
    return {**losses, "grad norm": apply()[1]}, gradients


def _share_of_batch(batch, groups):
    if groups.cp.size() > 1:
        positions = shard_positions(SEQ_LENGTH // groups.cp.size(), groups.cp, groups.cp.rank())
        batch = {key: x[:, positions] for key, x in batch.items()}
    per_rank = NUM_SAMPLES // groups.dp.size()
    mine = slice(groups.dp.rank() * per_rank, (groups.dp.rank() + 1) * per_rank)
    return {key: x[mine] for key, x in batch.items()}


def assert_gradients_equal(reference, shards, tolerance):
    """Compare each rank's shards with the slices of the serial gradients that they stand for."""
    serial = whole(reference)
    seen = {key: torch.zeros(gradient.shape) for key, gradient in serial.items()}
    for (key, offset), gradient in shards:
        place = region(offset, gradient)
        torch.testing.assert_close(
            gradient,
            serial[key][place],
            rtol=1e-6,
            atol=tolerance,
            msg=lambda m, key=key: f"{key}: {m}",
        )
        seen[key][place] = 1
    assert all(mask.all() for mask in seen.values())


MODELS = {
    "llama": (LLAMA, None),
    "gpt2, tied": (GPT2, None),
    "nemotron": (NEMOTRON, None),
    "student beside teacher": (
        replace(LLAMA, hidden_size=32, ffn_hidden_size=48, padded_vocab_size=104),
        LLAMA,
    ),
}
EXPERT_MODELS = {
    "moe": (MOE, None),
    "mixtral": (MIXTRAL, None),
    "moe beside moe": (replace(MOE, hidden_size=20, num_experts=2), MOE),
    "moe beside dense": (MOE, replace(LLAMA, vocab_size=91, padded_vocab_size=96)),
    "dense beside moe": (replace(LLAMA, vocab_size=91, padded_vocab_size=96), MOE),
}
BERT_MODELS = {
    "bert": (BERT, None),
    "bert, pre-norm, untied": (
        replace(
            BERT,
            apply_residual_connection_post_layernorm=False,
            num_tokentypes=0,
            untie_embeddings_and_output_weights=True,
        ),
        None,
    ),
    "bert beside bert": (replace(BERT, hidden_size=24, ffn_hidden_size=40), BERT),
}
# The student has other layers of the teacher's: its windows are elsewhere.
WINDOW_MODELS = {
    "windows beside windows": (
        replace(WINDOWS.with_layers([1, 2, 3, 0]), hidden_size=32, ffn_hidden_size=48),
        WINDOWS,
    ),
    "windows of gemma": (GEMMA, None),
}
ALL_LAYOUTS = LAYOUTS | EXPERT_LAYOUTS
ALL_MODELS = MODELS | EXPERT_MODELS | BERT_MODELS | WINDOW_MODELS
# The load-balancing losses of these models are among what must not depend on the layout.
CASES = [
    *product(MODELS, LAYOUTS),
    *product(["moe"], ["TP2+SP", "PP2", "DP2", "CP2", *EXPERT_LAYOUTS]),
    *product(["mixtral"], ["PP2xVPP2", "EP2", "EP2xTP2+SP"]),
    ("moe beside moe", "EP2xPP2"),
    ("moe beside dense", "EP2xTP2+SP"),
    ("dense beside moe", "EP2"),
    *product(["bert"], ["TP2", "TP2+SP", "PP2", "PP2xVPP2", "CP2"]),
    ("bert, pre-norm, untied", "TP2+SP"),
    *product(["windows beside windows"], ["TP2+SP", "PP2 uneven", "PP2xVPP2", "CP2"]),
    *product(["windows of gemma"], ["TP2+SP", "PP2 uneven", "CP2"]),
    *product(["bert beside bert"], ["TP2+SP", "PP2", "DP2"]),
]


@pytest.mark.parametrize(
    ("name", "layout", "modules"),
    [
        ("llama", "PP2", ["mlp"]),
        ("nemotron", "TP2+SP", ["core_attn", "mlp"]),
        ("gpt2, tied", "TP2", ["core_attn"]),
        ("student beside teacher", "TP2+SP", ["core_attn", "mlp"]),
        ("moe", "EP2", ["moe"]),
        ("moe", "EP2xTP2+SP", ["shared_experts"]),
    ],
)
def test_recomputed_modules_change_no_gradient(name, layout, modules, serial):
    arch, teacher = ALL_MODELS[name]
    world_size, sizes, options = ALL_LAYOUTS[layout]
    recompute = {"recompute_granularity": "selective", "recompute_modules": modules}
    options = options | {"recompute": recompute}
    results = run_ranks(world_size, gradients_of_one_step, arch, sizes, options, teacher)
    tolerance = 1e-8 if teacher is None else 1e-11
    shards = [x for _, gradients in results for x in gradients.items()]
    assert_gradients_equal(serial[name][1], shards, tolerance)


@pytest.fixture(scope="module")
def serial():
    """Return the serial reference of each model, computed once."""
    return {
        name: run_ranks(1, gradients_of_one_step, arch, {}, {}, teacher)[0]
        for name, (arch, teacher) in ALL_MODELS.items()
    }


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_loss_and_gradients_equal_serial(name, layout, serial):
    arch, teacher = ALL_MODELS[name]
    world_size, sizes, options = ALL_LAYOUTS[layout]
    results = run_ranks(world_size, gradients_of_one_step, arch, sizes, options, teacher)
    losses, gradients = serial[name]
    for rank_losses, _ in results:
        assert rank_losses == pytest.approx(losses, rel=1e-7)
    tolerance = 1e-8 if teacher is None else 1e-11
    assert_gradients_equal(gradients, [x for _, g in results for x in g.items()], tolerance)
