"""Gloo ranks of this machine, without a launcher.

    results = run_ranks(4, function, *args, preload=["megatron_ext.training.run"], timeout=120)

``function`` lives at the top level of a module and finds torch.distributed initialised (gloo, a
file store: fixed ports collide). Ranks are forked from a server that has imported ``preload``, so
that a call costs a fraction of a second and shares no state with another.
"""

import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_ext.runtime.errors import UserError


class RankError(RuntimeError):
    """A rank raised, died or hangs; ``cause`` is its exception in one line, or None."""

    def __init__(self, message: str, cause: str | None = None):
        super().__init__(message)
        self.cause = cause


def start_server(preload: Sequence[str]) -> Any:
    """Let the server begin to import ``preload``; returns the context of its ranks.

    The server that runs already stays, with what it has imported. Imports that fail are not
    reported.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    forkserver.ensure_running()
    return context


def run_ranks(
    world_size: int, function: Callable, *args: Any, preload: Sequence[str], timeout: float
) -> list[Any]:
    """Return ``function(*args)`` of every rank, by rank.

    Args:
        world_size: number of ranks.
        function: what each runs; found by its name there.
        args: that can be pickled.
        preload: modules, as ``start_server``.
        timeout: seconds without a result of any rank, after which they are taken to hang.

    Raises:
        RankError: at the first rank that failed; the others are ended.
    """
    context = start_server(preload)
    with tempfile.TemporaryDirectory() as folder:
        ranks, pipes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            ranks.append(
                context.Process(
                    target=_rank, args=(rank, world_size, folder, theirs, function, args)
                )
            )
            ranks[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            return _collect(pipes, timeout)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    import torch

    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout)
        if not ready:
            raise RankError(f"ranks {set(range(len(pipes))) - set(results)} hang ({timeout} s)")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                payload, error = pipe.recv()
            except EOFError:
                raise RankError(f"rank {rank} of {len(pipes)} died") from None
            if error is not None:
                raise RankError(f"rank {rank} of {len(pipes)} failed:\n{error[0]}", error[1])
            results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    rank: int, world_size: int, folder: str, pipe: Connection, function: Callable, args: tuple
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    import torch

    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        # torch.save, not pickle: a tensor pickled into a pipe is a handle that dies with the rank.
        payload = io.BytesIO()
        torch.save(function(*args), payload)
        pipe.send((payload.getvalue(), None))
    except BaseException as error:  # the parent must hear of it, whatever it was
        pipe.send((None, (traceback.format_exc(), _in_one_line(error))))


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({frame.filename}:{frame.lineno})"
