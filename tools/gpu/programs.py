"""Calibration, trimming and the programs themselves, as a user runs them."""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from tools.bench import calibration
from tools.gpu.setup import ROOT, Checks, Found, Setup, need_engine


def calibration_checks(setup: Setup) -> Checks:
    """Time the hooks of tools/bench/calibration.py at the width of a 7B model."""
    sizes = {"num_layers": 4, "hidden_size": 4096, "ffn_hidden_size": 14336, "seq_length": 4096}
    if setup.quick:
        sizes = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 96, "seq_length": 16}
    flags = Namespace(**sizes, samples=1, repeats=3 if setup.quick else 9)
    found: dict = {}
    for variant in calibration.VARIANTS:
        yield f"{variant}, bf16", lambda variant=variant: added(setup, flags, variant, found)


def added(setup: Setup, flags: Namespace, variant: str, found: dict) -> Found:
    """Return what the hooks of a variant add; all variants are measured at the first call."""
    if not found:
        found |= calibration.times(flags, setup.place, calibration.DTYPES["bf16"])
    bare, hooked = found[variant]
    share = statistics.median(b / a - 1 for a, b in zip(bare, hooked, strict=True))
    return Found(f"{share:+.1%} of {statistics.median(bare):.1f} ms")


def trim_checks(setup: Setup) -> Checks:
    """Run tools/bench/trim.py."""

    def run() -> Found:
        sizes = ["--num-layers", "2", "--hidden-size", "256", "--vocab-size", "500"]
        sizes += ["--ranks", "1", "--repeats", "1"]
        full = ["--num-layers", "16", "--hidden-size", "2048", "--ranks", "1", "4"]
        lines = output_of(["tools/bench/trim.py", *(sizes if setup.quick else full)]).splitlines()
        head = next(line for line in lines if line.startswith("source"))
        rows = [line.split() for line in lines if line.strip()[:1].isdigit()]
        speeds = [
            f"{row[0]} ranks {row[2]} MB/s read and cut, {row[4]} written too" for row in rows
        ]
        return Found(f"{head}; {'; '.join(speeds)}")

    yield "tools/bench/trim.py", run


SIZES = """
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --swiglu
    --normalization RMSNorm --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --max-position-embeddings 128 --lr-warmup-iters 1
    --attention-dropout 0 --hidden-dropout 0
"""
RUN = "--mock-data --tokenizer-type NullTokenizer --vocab-size 1000 --seq-length 128 --bf16"
TRAIN = "--micro-batch-size 4 --lr 1e-3 --eval-iters 0 --log-interval 1"
DISTIL = f"pretrain_distill.py --load pruned --teacher-load teacher --train-iters 3 {TRAIN}"
ENGINE = "--transformer-impl transformer_engine"
FP8 = f"{ENGINE} --fp8-format hybrid"
# name -> (command without RUN, whether it needs Transformer Engine). Folders follow from others.
COMMANDS = {
    "train": (
        f"pretrain_distill.py --save teacher --save-interval 5 --train-iters 5 {TRAIN} {SIZES}",
        False,
    ),
    "prune": (
        "prune.py --load teacher --save pruned --micro-batch-size 4 --calibration-samples 16 "
        "--target-ffn-hidden-size 192 --target-hidden-size 96",
        False,
    ),
    "distil": (f"{DISTIL} --save student --save-interval 3", False),
    "go on": (
        f"{DISTIL} --save student --save-interval 3".replace(
            "--train-iters 3", "--train-iters 5 --override-opt-param-scheduler"
        ),
        False,
    ),
    "fused output": (f"{DISTIL} --kd-fused-output", False),
    "hidden states": (f"{DISTIL} --kd-hidden-states 1:1,embedding,mlp:2:2", False),
    "FP8 delayed": (f"{DISTIL} {FP8} --save d --save-interval 3", True),
    "FP8 delayed, go on": (
        f"{DISTIL} {FP8} --save d --save-interval 3".replace(
            "--train-iters 3", "--train-iters 5 --override-opt-param-scheduler"
        ),
        True,
    ),
    "FP8 of the teacher alone": (f"{DISTIL} {ENGINE} --teacher-fp8-format e4m3", True),
    "FP8 weights": (
        f"{DISTIL} {FP8} --fp8-recipe tensorwise --fp8-param-gather --use-distributed-optimizer",
        True,
    ),
    "FP8 checkpoint in local layers": (
        f"{DISTIL} --transformer-impl local --finetune".replace("--load pruned", "--load d"),
        False,
    ),
}
QUICK = ("train", "prune", "distil")


def program_checks(setup: Setup) -> Checks:
    """Run the programs in one folder, each after what it reads from."""
    with tempfile.TemporaryDirectory() as folder:
        for name in QUICK if setup.quick else COMMANDS:
            yield name, lambda name=name: program(setup, name, folder)


def program(setup: Setup, name: str, folder: str) -> Found:
    """Run one command to its end."""
    command, needs = COMMANDS[name]
    if needs or name == "FP8 checkpoint in local layers":
        need_engine(setup)
    script, *argv = f"{command} {RUN}".split()
    start = time.perf_counter()
    output = output_of([script, *argv, "--device", setup.place.device.type], folder)
    losses = re.findall(r"(?:lm|kd|hidden) loss: [^ |]+", output)
    seconds = time.perf_counter() - start
    return Found(f"{seconds:.0f} s{', '.join(['', *losses[-1:]])}", "ends with 0", ok=True)


def output_of(argv: list[str], folder: str = ".") -> str:
    """Run a program of this project in a folder; its stdout.

    Raises:
        RuntimeError: with the last line that it said, if it does not end with 0.
    """
    script = str(ROOT / argv[0])
    # This process has joined a group of one; the other begins its own.
    rank = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in rank}
    where = Path(folder) if folder != "." else ROOT
    done = subprocess.run(
        [sys.executable, script, *argv[1:]],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if line.startswith("ERROR")]
        raise RuntimeError(f"code {done.returncode}: {(errors or lines)[-1]}")
    return done.stdout
