"""Gloo ranks inside plain pytest.

    results = run_ranks(4, function, *args)      # [function's result on rank 0, 1, 2, 3]

``function`` lives at the top level of a module of ``tests`` and finds torch.distributed initialised
(gloo, a file store: fixed ports collide). Ranks are forked from a server that has already imported
torch and megatron-core, so a call costs a fraction of a second and shares no state with another.
"""

import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

# What the programs import behind their boundary (``runtime.heavy``), and what torch's optimizers
# and megatron-core's tokenizers import when they are made. Imports that fail are not reported.
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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
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
            raise AssertionError(
                f"ranks {set(range(len(pipes))) - set(results)} hang ({timeout} s)"
            )
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                ok, payload = pipe.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            if not ok:
                raise AssertionError(f"rank {rank} of {len(pipes)} failed:\n{payload}")
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
        pipe.send((True, payload.getvalue()))
    except BaseException:  # the parent must hear of it, whatever it was
        pipe.send((False, traceback.format_exc()))
