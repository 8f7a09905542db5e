"""Initial weights that no layout changes: each is drawn whole, from a generator of its own."""

import hashlib
import math
from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from torch import Tensor

from megatron_ext.arch import Arch, mamba, names_on_disk, weights
from megatron_ext.checkpoint.checkpoints import sharded_tensors


@torch.no_grad()
def initialize_weights(state: ShardedStateDict, arch: Arch, seed: int) -> None:
    """Draw every weight from its own generator, seeded by (seed, name, layer, expert).

    ``state`` shares memory with the parameters of this rank (``build.model_state_dict``). Each rank
    draws the whole tensor and keeps its shard, so that a seed gives the same model under every
    layout. (megatron-core draws from one generator per tensor-parallel rank.) The layer of a
    HybridModel is the sub-layer's number within its kind: with the same seed, a pattern of whole
    layers begins as a GPTModel does. No collectives.

    Raises:
        ValueError: the model has a weight without a row in ``arch.weights``.
    """
    rows = {
        key: (weight, str(number) if arch.is_hybrid else "")
        for weight in weights(arch)
        for number, key in enumerate(names_on_disk(weight, arch))
    }
    std = arch.init_method_std
    stds = {"normal": std, "scaled": std / len(arch.pattern) ** 0.5}
    for shard in sharded_tensors(state):
        if shard.key not in rows:
            raise ValueError(f"{shard.key} has no row in the table of weights (megatron_ext/arch).")
        weight, number = rows[shard.key]
        init = weight.init
        if init in ("ones", "zeros"):
            shard.data.fill_(float(init == "ones"))
            continue
        if init in DRAWN:
            uniform = draw(shard, seed, None, (weight.key, number))
            shard.data.copy_(DRAWN[init](uniform))
            continue
        shard.data.copy_(draw(shard, seed, stds[init], (weight.key, number)))


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))


def _steps(uniform: Tensor) -> Tensor:
    """Return biases of steps that are spread from 0.001 to 0.1 by their logarithm."""
    return _inverse_softplus(torch.exp(math.log(1e-3) + uniform * math.log(100)))


# What Mamba's parameters are made of, numbers from [0, 1), as megatron-core has it: a convolution's
# are from +- 1 / sqrt(taps), decays from 1 to 16.
DRAWN: dict[str, Callable[[Tensor], Tensor]] = {
    "conv": lambda uniform: (2 * uniform - 1) / mamba.TAPS**0.5,
    "step": _steps,
    "decay": lambda uniform: torch.log(1 + 15 * uniform),
}


def draw(
    shard: ShardedTensor, seed: int, std: float | None, name: tuple[str, str] | None = None
) -> Tensor:
    """Return this rank's share of a tensor of normal numbers, which is drawn whole. No collectives.

    Without ``std`` of numbers from [0, 1), float32.

    The numbers follow from the seed and the shard's name, layer and expert; or from ``name``, the
    name and the layer of a HybridModel's weight as a GPTModel would have them.
    """
    axes = shard.prepend_axis_num
    key, number = name or (shard.key, "")
    which = " ".join([number, *map(str, shard.global_offset[:axes])]).strip() or "0"
    digest = hashlib.sha256(f"{seed} {key} {which}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    whole = torch.empty(shard.global_shape[axes:])
    if std is None:
        whole.uniform_(generator=generator)
    else:
        whole.normal_(std=std, generator=generator)
    place = tuple(
        slice(start, start + length)
        for start, length in zip(shard.global_offset[axes:], shard.local_shape, strict=True)
    )
    return whole[place]
