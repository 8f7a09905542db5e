"""Gloo ranks inside plain pytest.

    results = run_ranks(4, function, *args)      # [function's result on rank 0, 1, 2, 3]

``function`` lives at the top level of a module of ``tests``; see ``runtime.local_ranks``.
"""

from collections.abc import Callable
from typing import Any

from megatron_ext.runtime import local_ranks

# What the programs import behind their boundary (``runtime.heavy``), and what torch's optimizers
# and megatron-core's tokenizers import when they are made.
PRELOAD = [
    "megatron_ext.training.run",
    "megatron_ext.pruning.run",
    "megatron_ext.distillation.hidden",
    "torch._dynamo",
    "transformers",
    "tests.ranks",
]


def run_ranks(world_size: int, function: Callable, *args: Any, timeout: float = 120) -> list[Any]:
    """Return ``function(*args)`` of every rank, by rank; raise with the first traceback of any."""
    try:
        return local_ranks.run_ranks(world_size, function, *args, preload=PRELOAD, timeout=timeout)
    except local_ranks.RankError as error:
        raise AssertionError(str(error)) from None
