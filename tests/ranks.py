"""Gloo ranks inside plain pytest.

    results = run_ranks(4, function, *args)      # [function's result on rank 0, 1, 2, 3]

``function`` lives at the top level of a module of ``tests``; see ``runtime.local_ranks``. Ranks are
forked from a server that has imported ``tests.preload``.
"""

from collections.abc import Callable
from typing import Any

from megatron_ext.runtime import local_ranks

PRELOAD = ["tests.preload"]


def run_ranks(world_size: int, function: Callable, *args: Any, timeout: float = 120) -> list[Any]:
    """Return ``function(*args)`` of every rank, by rank; raise with the first traceback of any."""
    try:
        return local_ranks.run_ranks(world_size, function, *args, preload=PRELOAD, timeout=timeout)
    except local_ranks.RankError as error:
        raise AssertionError(str(error)) from None
