"""Transformer Engine's layers against local ones: loss, gradients, scores, checkpoints.

Limits are those of rounding: the mantissa of the dtype (of TF32 for float32 in Transformer Engine's
products), with a margin for the depth of the models. None of them was fitted to a measurement.
"""

import tempfile
from argparse import Namespace
from dataclasses import replace

import torch
from torch import Tensor

from megatron_ext.arch import Arch
from megatron_ext.checkpoint import checkpoints, writer
from megatron_ext.checkpoint.checkpoints import sharded_tensors
from megatron_ext.model.build import LanguageModel, build_model, model_state_dict
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.open import restore_weights
from megatron_ext.pruning.importance import Importance
from tools.gpu.setup import DTYPES, Checks, Found, Setup, need_engine

LLAMA = Arch(
    num_layers=4,
    hidden_size=512,
    ffn_hidden_size=1536,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=64,
    max_position_embeddings=4096,
    vocab_size=8000,
    padded_vocab_size=8064,
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
    attention_dropout=0.0,
    hidden_dropout=0.0,
)
MODELS = {
    "llama": LLAMA,
    "nemotron": replace(
        LLAMA,
        normalization="LayerNorm",
        apply_layernorm_1p=True,
        swiglu=False,
        squared_relu=True,
        qk_layernorm=True,
        rotary_percent=0.5,
    ),
    "gpt2": replace(
        LLAMA,
        normalization="LayerNorm",
        position_embedding_type="learned_absolute",
        swiglu=False,
        add_bias_linear=True,
        num_query_groups=8,
        untie_embeddings_and_output_weights=False,
    ),
}
# Largest relative distance of the loss, and of a weight's gradient.
LIMITS = {"fp32": (1e-3, 1e-2), "bf16": (5e-3, 6e-2)}


def sized(arch: Arch, setup: Setup) -> Arch:
    """Return ``arch``, or a tiny model of its kind."""
    if not setup.quick:
        return arch
    tiny = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16}
    return replace(arch, **tiny, vocab_size=250, padded_vocab_size=256)


def engine_checks(setup: Setup) -> Checks:
    """Compare loss, gradients, scores and checkpoints of both kinds of layers."""
    for name, arch in MODELS.items():
        for dtype in DTYPES:
            yield (
                f"{name} {dtype}: loss, worst gradient",
                lambda arch=arch, dtype=dtype: parity(setup, sized(arch, setup), dtype),
            )
    yield "importance scores, bf16", lambda: scores_apart(setup, sized(LLAMA, setup))
    yield "checkpoint of local layers", lambda: moved(setup, "local", "transformer_engine")
    yield (
        "checkpoint of Transformer Engine's",
        lambda: moved(setup, "transformer_engine", "local"),
    )


def tokens_of(setup: Setup, arch: Arch, seed: int, batch: int = 2) -> dict[str, Tensor]:
    """Return a micro-batch of random tokens on the device."""
    seq_length = 32 if setup.quick else 512
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(arch.vocab_size, (batch, seq_length + 1), generator=generator)
    found = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": torch.arange(seq_length).repeat(batch, 1),
        "loss_mask": torch.ones(batch, seq_length),
    }
    return {name: x.to(setup.place.device) for name, x in found.items()}


def model_of(setup: Setup, arch: Arch, impl: str, dtype: str, seed: int = 1) -> LanguageModel:
    """Return a whole model with the weights of ``seed``."""
    options = ModelOptions(
        params_dtype=DTYPES[dtype],
        transformer_impl=impl,
        fuse_kernels=setup.place.device.type == "cuda",
    )
    return build_model(arch, options, setup.place.groups, seed=seed)[0]


def loss_and_gradients(model: LanguageModel, batch: dict[str, Tensor]) -> tuple[float, dict]:
    """Return the mean loss and {tensor on disk: its gradient}, in float64. The weights are lost."""
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    losses.float().mean().backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    shards = sharded_tensors(model_state_dict([model]))
    gradients = {(s.key, s.global_offset): s.data.detach().double().clone() for s in shards}
    return losses.float().mean().item(), gradients


def parity(setup: Setup, arch: Arch, dtype: str) -> Found:
    """Compare one step of both kinds of layers."""
    need_engine(setup)
    batch = tokens_of(setup, arch, seed=2)
    local, engine = (
        loss_and_gradients(model_of(setup, arch, impl, dtype), batch)
        for impl in ("local", "transformer_engine")
    )
    loss = abs(local[0] - engine[0]) / abs(local[0])
    worst, where = max(
        ((engine[1][key] - x).norm().item() / max(x.norm().item(), 1e-30), key[0])
        for key, x in local[1].items()
    )
    most_loss, most = LIMITS[dtype]
    result = f"{loss:.1e}, {worst:.1e} ({where.removeprefix('decoder.')})"
    return Found(result, f"{most_loss:.0e}, {most:.0e}", loss <= most_loss and worst <= most)


def scores_apart(setup: Setup, arch: Arch) -> Found:
    """Compare the scores that hooks find in both kinds of layers."""
    need_engine(setup)
    batch, found = tokens_of(setup, arch, seed=3), []
    for impl in ("local", "transformer_engine"):
        model = model_of(setup, arch, impl, "bf16").eval()
        importance = Importance([model], arch, setup.place.groups, sequence_parallel=False)
        importance.expect(batch["loss_mask"])
        with torch.no_grad(), importance.attached():
            model(batch["tokens"], batch["position_ids"], None)
        found.append(importance.collect())
    worst = max((found[1][k] - x).norm().item() / x.norm().item() for k, x in found[0].items())
    return Found(f"{worst:.1e} apart", "2e-2", worst <= 2e-2)


def moved(setup: Setup, source: str, target: str) -> Found:
    """Write a checkpoint with one kind of layers and read it with the other."""
    need_engine(setup)
    arch = sized(MODELS["nemotron"], setup)
    before = model_of(setup, arch, source, "bf16")
    after = model_of(setup, arch, target, "bf16", seed=9)
    with tempfile.TemporaryDirectory() as folder:
        state = {**model_state_dict([before]), "args": Namespace(**arch.to_args())}
        writer.save(folder, checkpoints.RELEASE, state, files={})
        restore_weights([after], checkpoints.read(folder))
    both = [
        {(s.key, s.global_offset): s.data for s in sharded_tensors(model_state_dict([model]))}
        for model in (before, after)
    ]
    same = sum(torch.equal(x, both[1][key]) for key, x in both[0].items())
    return Found(f"{same} of {len(both[0])} tensors equal", "all", same == len(both[0]))
