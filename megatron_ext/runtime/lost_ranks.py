"""The message of a collective that fails because another rank was killed, or hangs."""

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

PATIENCE = 3.0
"""Seconds that the other ranks get to say that they are there."""
KEY = "megatron_ext/is there"
# Gloo's words for a closed connection and for one that is silent.
REASON = re.compile(
    r"(Connection (closed|reset) by peer|Timed out waiting|Broken pipe|Connection refused)[^\n]*"
)


@contextlib.contextmanager
def noted(where: str) -> Iterator[None]:
    """Let an error that comes out of the block say where it was."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(where)
        raise


def explain(error: Exception, store: Any, rank: int, world_size: int) -> str | None:
    """Return one line about a collective that failed, or None if ``error`` is another one.

    Ranks that are there say so to each other: those that do not are named.

    Args:
        error: of a collective.
        store: through which ranks exchange small things (torch.distributed's), or None.
        rank: of this process.
        world_size: number of ranks.
    """
    found = REASON.search(str(error))
    if found is None or world_size == 1:
        return None
    where = "".join(f" in {note}" for note in getattr(error, "__notes__", []))
    silent = _silent(store, rank, world_size) if store else []
    names = ", ".join(map(str, silent[:8]))
    who = f"rank {names} does not answer" if silent else "a rank does not answer"
    return (
        f"{who}{where} ({found[0].rstrip(' .')}): it was killed, or its machine has failed or "
        "hangs; start again to go on from the last checkpoint."
    )


def _silent(store: Any, rank: int, world_size: int) -> list[int]:
    """Return the ranks that do not say that they are there."""
    keys = [f"{KEY} {each}" for each in range(world_size)]
    try:
        store.set(keys[rank], "1")
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and not store.check(keys):
            time.sleep(0.05)
        return [each for each, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:  # rank 0 may keep the store
        return [0]
