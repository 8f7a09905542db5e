"""All ranks succeed together or fail together.

A rank that raises alone leaves the others waiting in their next collective until the timeout. These
functions run what may fail on some ranks only, and raise what failed on every rank. Each is one
collective over all ranks of small Python objects; without torch.distributed this process is alone.
"""

import hashlib
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_ext.runtime.errors import UserError
from megatron_ext.runtime.files import give_lock_back, take_lock


def gather[T](value: T) -> list[T]:
    """Return the values of all ranks, by rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def on_all_ranks[T](action: Callable[[], T]) -> T:
    """Return ``action()`` of this rank, or raise the error of the first rank that failed."""
    result, error = _try(action)
    for other in gather(error):
        if other is not None:
            raise other
    return result


def on_first_rank[T](action: Callable[[], T]) -> T:
    """Return ``action()`` of rank 0, which alone runs it, or raise its error."""
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    result, error = gather(_try(action) if is_first else None)[0]
    if error is not None:
        raise error
    return result


@contextmanager
def locked(locks: Mapping[Path, str]) -> Iterator[None]:
    """Keep other runs from what is written inside; rank 0 holds the locks. Collective.

    Args:
        locks: files as of ``files``, and what each stands for, for messages. Removed at the end.

    Raises:
        UserError: on every rank, as ``files.take_lock``.
    """
    try:
        on_first_rank(lambda: [take_lock(*lock) for lock in locks.items()] and None)
        yield
    finally:
        for lock in locks:
            give_lock_back(lock)


def check_alike(values: Mapping[str, Any], fix: str, code: int) -> None:
    """Refuse ``values`` that are not the same on all ranks, in one gather of a hash. Collective.

    Args:
        values: by the name that a message gives them; plain values.
        fix: what to do, for the message.
        code: to exit with.

    Raises:
        UserError: on every rank, naming the first value that differs, both values and the host.
    """
    described = repr(sorted(values.items())).encode()
    if len(set(gather(hashlib.sha256(described).digest()))) == 1:
        return
    known = gather((socket.gethostname(), dict(values)))
    first = known[0][1]
    for rank, (host, others) in enumerate(known):
        for name in sorted(first.keys() | others.keys()):
            here, there = first.get(name, "absent"), others.get(name, "absent")
            if repr(here) != repr(there):
                raise UserError(
                    f"{name} is {here} on rank 0 and {there} on rank {rank} ({host}): {fix}.", code
                )


def _try[T](action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error
