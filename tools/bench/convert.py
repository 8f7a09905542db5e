"""Seconds and peak memory of import and export, beside a copy of the same bytes.

    python tools/bench/convert.py [--ranks 1]

A random Llama of about half a billion parameters in bf16, 1 GB, in files of 300 MB. Memory is the
peak resident size of the largest rank, beside that of a process that only imports the program.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_ext.arch import Arch, num_parameters
from megatron_ext.cli.parser import flag, parse
from megatron_ext.convert.config import config_of
from megatron_ext.convert.exporter import index_of, into_shards, shard_names
from megatron_ext.convert.families import FAMILIES
from megatron_ext.convert.hf_folder import header_of, write_weights
from megatron_ext.convert.pieces import pieces
from megatron_ext.runtime.errors import run_main
from tools import convert

SHARD = 300 * 10**6
RANK = "rank"
ARCH = Arch(
    num_layers=24,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=16,
    num_query_groups=8,
    kv_channels=64,
    max_position_embeddings=4096,
    vocab_size=65536,
    padded_vocab_size=65536,
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
    hidden_dropout=0.0,
)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Bench."""

    ranks: int = flag(1, "processes of a conversion", at_least=1)


@dataclass(frozen=True, kw_only=True)
class BenchFlags:
    """Measure conversions."""

    bench: Bench


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table."""
    ranks = parse(BenchFlags, argv).bench.ranks
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_folder(root / "hf")
        size = sum(path.stat().st_size for path in (root / "hf").iterdir())
        began = time.monotonic()
        shutil.copytree(root / "hf", root / "copy")
        copied = time.monotonic() - began
        shutil.rmtree(root / "copy")
        _, base = run(ranks, [])
        places = {
            "import": ["import", "--hf", f"{root}/hf", "--save", f"{root}/megatron"],
            "export": ["export", "--load", f"{root}/megatron", "--hf", f"{root}/again"],
        }
        print(f"{num_parameters(ARCH):,} parameters, {size / 2**30:.2f} GiB, {ranks} ranks")
        print(f"{'copy':8}{copied:8.1f} s")
        for kind, flags in places.items():
            extra = ["--max-shard-size", str(SHARD)] if kind == "export" else []
            seconds, memory = run(ranks, [*flags, *extra])
            print(f"{kind:8}{seconds:8.1f} s {memory - base:8.2f} GiB above {base:.2f}")


def write_folder(folder: Path) -> None:
    """Write the model, file by file."""
    folder.mkdir()
    family = FAMILIES["llama"]
    shards = into_shards(list(pieces(ARCH, family)), lambda x: 2 * x.numel(ARCH), SHARD)
    names, headers = shard_names(len(shards)), []
    for shard, name in zip(shards, names, strict=True):
        shapes = {k: v for piece in shard for k, v in piece.shapes(ARCH, ARCH.vocab_size).items()}
        headers.append(header_of((k, size, torch.bfloat16) for k, size in shapes.items()))
        weights = (torch.randn(size).bfloat16() for size in shapes.values())
        write_weights(folder / name, headers[-1], weights)
    index = index_of(headers, names)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_of(ARCH, family, {}, "bfloat16")))


def run(ranks: int, flags: Sequence[str]) -> tuple[float, float]:
    """Run tools/convert.py; return its seconds and the peak GiB of the largest rank."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with tempfile.TemporaryDirectory() as peaks:
        command = [sys.executable, *(launch if ranks > 1 else []), __file__, RANK, peaks, *flags]
        began = time.monotonic()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        seconds = time.monotonic() - began
        return seconds, max(float(path.read_text()) for path in Path(peaks).iterdir())


def run_rank(folder: str, flags: Sequence[str]) -> None:
    """Run tools/convert.py in this process and leave its peak memory, GiB, in ``folder``."""
    if flags:
        convert.main(flags)
    status = Path("/proc/self/status").read_text()  # unlike getrusage, without what started it
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    (Path(folder) / os.environ.get("RANK", "0")).write_text(str(int(peak) / 2**20))


if __name__ == "__main__":
    if sys.argv[1:2] == [RANK]:
        run_rank(sys.argv[2], sys.argv[3:])
    else:
        run_main(main)
