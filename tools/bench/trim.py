"""The cost of trimming: a checkpoint of random weights cut on several ranks, beside a plain copy.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=99999999999 python tools/bench/trim.py

Files come from the page cache and are written with fsync, in the copy too. MB/s are those of the
source's bytes that are kept; memory is the growth of a rank's largest resident set from before the
trim, beside its share of the pruned model and the largest piece of the source.
"""

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_ext.arch import Arch, dim_sizes, num_parameters, shape, weights
from megatron_ext.checkpoint import writer
from megatron_ext.checkpoint.slices import SliceReader
from megatron_ext.pruning.baselines import random_scores
from megatron_ext.pruning.plan import Plan
from megatron_ext.pruning.planner import make_plan
from megatron_ext.pruning.scores import Scores
from megatron_ext.pruning.trim import deal, pieces, trimmed_share
from megatron_ext.runtime.platform import emulate_cuda_on_cpu
from tests.ranks import run_ranks

MB = 1e6


def main() -> None:
    """Print the copy and a row per number of ranks."""
    flags = parse()
    arch = source_arch(flags)
    target = replace(
        arch,
        hidden_size=arch.hidden_size * 3 // 4,
        ffn_hidden_size=arch.ffn_hidden_size // 2,
        num_layers=arch.num_layers - 1,
    )
    scores = Scores(
        vectors=random_scores(arch, 1), source=arch, aggregation="random", samples=0, seq_length=0
    )
    plan = make_plan(scores, arch, target)
    kept = 2 * num_parameters(target)
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        run_ranks(1, partial(write, folder, arch), timeout=600)
        seconds = min(copy(f"{folder}/release", f"{folder}/copy") for _ in range(flags.repeats))
        size = 2 * num_parameters(arch)
        print(f"source {size / MB:,.0f} MB bf16, pruned {kept / MB:,.0f} MB")
        print(f"copy of the source: {seconds:.2f} s, {size / MB / seconds:,.0f} MB/s")
        print(f"{'ranks':>5}{'read+cut s':>12}{'MB/s':>9}{'with write s':>14}{'MB/s':>9}", end="")
        print(f"{'memory MB':>11}{'share':>8}{'piece':>8}")
        piece = max(2 * prod(dim_sizes(arch)[d] for d in p.dims) for p in pieces(plan))
        for ranks in flags.ranks:
            results = [
                run_ranks(ranks, trim, f"{folder}/release", f"{folder}/out", plan, timeout=600)
                for _ in range(flags.repeats)
            ]
            read = min(max(r[0] for r in result) for result in results)
            whole = min(max(r[1] for r in result) for result in results)
            memory = max(r[2] for result in results for r in result)
            share = max(
                sum(2 * prod(dim_sizes(target)[d] for d in p.dims) for p in hand)
                for hand in deal(pieces(plan), target, ranks)
            )
            print(f"{ranks:5}{read:12.2f}{kept / MB / read:9,.0f}{whole:14.2f}", end="")
            print(f"{kept / MB / whole:9,.0f}{memory / MB:11,.0f}{share / MB:8,.0f}", end="")
            print(f"{piece / MB:8,.0f}", flush=True)


def source_arch(flags: argparse.Namespace) -> Arch:
    """Return a Llama-like architecture of the flags' sizes."""
    return Arch(
        num_layers=flags.num_layers,
        hidden_size=flags.hidden_size,
        ffn_hidden_size=flags.hidden_size * 7 // 2,
        num_attention_heads=flags.hidden_size // 64,
        num_query_groups=flags.hidden_size // 256,
        kv_channels=64,
        max_position_embeddings=2048,
        vocab_size=flags.vocab_size,
        padded_vocab_size=flags.vocab_size,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
    )


def write(folder: str, arch: Arch) -> None:
    """Save random bytes as a checkpoint of ``arch``, in bfloat16, a chunk per layer."""
    emulate_cuda_on_cpu()
    state = {"args": Namespace(**arch.to_args()), "iteration": 0}
    noise = torch.randint(-(2**15), 2**15, (2**16,), dtype=torch.int16)
    for weight in weights(arch):
        size = shape(weight, arch)
        tensor = noise.repeat(-(-prod(size) // len(noise)))[: prod(size)].view(size)
        tensor = tensor.view(torch.bfloat16)
        for layer in range(arch.num_layers) if weight.per_layer else [None]:
            place = [] if layer is None else [(0, layer, arch.num_layers)]
            state[f"{weight.key} {layer}"] = ShardedTensor.from_rank_offsets(
                weight.key, tensor, *place, prepend_axis_num=len(place)
            )
    writer.save(folder, "release", state, files={})


def copy(source: str, target: str) -> float:
    """Return the seconds of a plain copy of a folder's files, synced."""
    shutil.rmtree(target, ignore_errors=True)
    start = time.perf_counter()
    shutil.copytree(source, target)
    os.sync()
    return time.perf_counter() - start


def trim(source: str, target: str, plan: Plan) -> tuple[float, float, float]:
    """Return this rank's seconds to read and cut, and to save too, and its growth in bytes."""
    emulate_cuda_on_cpu()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.distributed.barrier()
    before, start = resident(), time.perf_counter()
    share = trimmed_share(SliceReader(source), plan, rank, ranks)
    read, memory = time.perf_counter() - start, resident() - before
    state = {"model": share, "args": Namespace(**plan.target.to_args()), "iteration": 0}
    writer.save(target, "release", state, files={})
    return read, time.perf_counter() - start, memory


def resident() -> float:
    """Return the largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def parse() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-layers", type=int, default=16)
    parser.add_argument("--hidden-size", type=int, default=1024, help="a multiple of 256")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--folder", help="where files are written; default the temporary folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
