"""The kernels that sum over positions: ``sums_c`` on CPUs, ``sums_triton`` on CUDA, or none.

Shape letters are those of ``aggregation``. Both modules have these four functions. Each makes one
read of the activations, or declines and returns None (``add_samples``: False): ``importance`` and
``OverSamples`` then compute in torch. None without a compiler (``compiled``) or Triton, for other
dtypes and aggregations, and for channels that do not lie side by side; MEGATRON_EXT_NATIVE=0 has
them always decline. Threads change no bit of a result.
"""

import functools
import importlib
import os
from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

MODULES = {"cpu": "sums_c", "cuda": "sums_triton"}


def unit_sums(kind: str, tensors: Sequence[Tensor], left_out: Tensor | None) -> Tensor | None:
    """Return ``sums_over_positions`` of one tensor, [K, B, c] float64.

    Args:
        kind: mean, l2 or var (in Triton alone).
        tensors: one, [s, B, c].
        left_out: [s, B] bool, contiguous, true at positions that take no part; None for none.
    """
    module = _module(tensors[0].device.type)
    return None if module is None else module.unit_sums(kind, tensors, left_out)


def head_sums(
    kind: str, tensors: Sequence[Tensor], left_out: Tensor | None, *, channels: int
) -> Tensor | None:
    """Return those of the L2 norms of heads of D ``channels``, [K, B, c] of [s, B, c * D]."""
    module = _module(tensors[0].device.type)
    return None if module is None else module.head_sums(kind, tensors, left_out, channels=channels)


def change_sums(kind: str, tensors: Sequence[Tensor], left_out: Tensor | None) -> Tensor | None:
    """Return the sum of 1 - cos of two tensors [s, B, H], [1, B, 1] float64; mean alone."""
    module = _module(tensors[0].device.type)
    return None if module is None else module.change_sums(kind, tensors, left_out)


def add_samples(
    totals: tuple[Tensor, Tensor], kind: str, sums: Tensor, num_positions: Tensor, weights: Tensor
) -> bool:
    """Do what ``OverSamples.add`` does with the sums of a micro-batch; False where it declines.

    Args:
        totals: ``OverSamples.sums`` [2, c] and ``count`` [], float64, changed.
        kind: aggregation over positions, mean, l2 or var (in Triton alone).
        sums: [K, B, c] float64.
        num_positions: [B, 1] float64.
        weights: [B] float64.
    """
    module = _module(sums.device.type)
    return module is not None and module.add_samples(totals, kind, sums, num_positions, weights)


@functools.cache
def _module(device_type: str) -> ModuleType | None:
    """Return the module of kernels for a kind of device, or None without Triton."""
    if device_type not in MODULES or os.environ.get("MEGATRON_EXT_NATIVE") == "0":
        return None
    try:
        return importlib.import_module(f"{__package__}.{MODULES[device_type]}")
    except ImportError:
        return None
