"""Prune one teacher by eleven kinds of scores, and leave its layers out one by one; no training.

    bash examples/from-scratch/run.sh                     # makes the teacher, the data and .venv
    .venv/bin/python examples/importance/run.py [--from-scratch runs/from-scratch] [--jobs 2]

The nine aggregations of Table 11 (arXiv 2407.14679), weight magnitude and random scores (three
seeds), all cut to the shape of from-scratch's student, and the loss right after; then the score
of each layer by each depth metric. Writes results.md and results.png.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.cli.parser import flag, parse
from megatron_ext.pruning.scores_file import load_scores
from megatron_ext.report import markdown_table, new_figure
from megatron_ext.runtime.errors import RUNTIME, USAGE, UserError, run_main

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("mean", "l2", "var")
SETTINGS = {
    **{
        f"batch {batch}, sequence {sequence}": (
            ["--importance-batch", batch, "--importance-sequence", sequence]
        )
        for batch in KINDS
        for sequence in KINDS
    },
    "magnitude": ["--importance", "magnitude"],
    **{
        f"random, seed {seed}": ["--importance", "random", "--seed", str(seed)]
        for seed in (1, 2, 3)
    },
}
DEPTH = ("loss", "kl", "block")
SIZES = ["--target-hidden-size", "192", "--target-ffn-hidden-size", "384"]
KL, LM = "kd loss validation", "lm loss validation"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Experiment."""

    from_scratch: str = flag("runs/from-scratch", "folder of a finished examples/from-scratch")
    output: str = flag("runs/importance", "folder of the pruned models and results")
    calibration_samples: int = flag(256, "samples that activations are measured on", at_least=1)
    depth_samples: int = flag(128, "samples that layers are left out on", at_least=1)
    eval_iters: int = flag(50, "validation batches of 16 samples", at_least=1)
    jobs: int = flag(2, "settings at a time, a core each", at_least=1)


@dataclass(frozen=True, kw_only=True)
class ExperimentFlags:
    """Prune one teacher by eleven kinds of scores."""

    experiment: Experiment


def main(argv: Sequence[str] | None = None) -> None:
    """Run every setting that has no result yet and write the table and the plot."""
    options = parse(ExperimentFlags, argv).experiment
    if not (Path(options.from_scratch) / "done" / "teacher").exists():
        raise UserError(
            f"--from-scratch {options.from_scratch}: no finished teacher; run from-scratch first.",
            USAGE,
        )
    Path(options.output).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        losses = dict(
            zip(SETTINGS, pool.map(lambda name: measure(name, options), SETTINGS), strict=True)
        )
        layers = list(pool.map(lambda kind: depth_scores(kind, options), DEPTH))
    write(losses, layers, Path(options.output))


SHAPE = ["--bf16", "--seq-length", "128", "--micro-batch-size", "8", "--num-workers", "0"]


def tokenizer(source: Path) -> list[str]:
    """Return the flags of from-scratch's tokenizer."""
    model = str(source / "corpus/tokenizer.model")
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]


def train_data(source: Path) -> list[str]:
    """Return the flags of the data that calibration reads."""
    return ["--train-data-path", str(source / "data/train_text_document"), *tokenizer(source)]


def depth_scores(kind: str, options: Experiment) -> list[float]:
    """Return the score of each layer of the teacher by one depth metric."""
    source, folder = Path(options.from_scratch), Path(options.output) / f"depth-{kind}"
    scores = folder / "scores.safetensors"
    if not scores.exists():
        samples = ["--calibration-samples", str(options.depth_samples)]
        files = ["--load", str(source / "teacher"), "--scores", str(scores)]
        arguments = ["--depth-importance", kind, *SHAPE, *train_data(source), *samples, *files]
        call("prune.py", arguments, folder)
    return load_scores(scores).vectors["layers"].tolist()


def measure(name: str, options: Experiment) -> dict[str, float]:
    """Return KL to the teacher and validation loss of the model pruned by setting ``name``."""
    source, top = Path(options.from_scratch), Path(options.output)
    folder = top / name.replace(", ", "-").replace(" ", "-")
    teacher = str(source / "teacher")
    needs_data = "--importance" not in SETTINGS[name]
    if not (folder / "pruned").exists():
        call(
            "prune.py",
            [
                *SETTINGS[name],
                *SIZES,
                *SHAPE,
                *(train_data(source) if needs_data else []),
                *["--calibration-samples", str(options.calibration_samples)],
                *["--load", teacher, "--save", str(folder / "pruned")],
            ],
            folder,
        )
    if not (folder / "evaluation/metrics.jsonl").exists():
        call(
            "pretrain_distill.py",
            [
                *["--skip-train", "--global-batch-size", "16", *SHAPE, *tokenizer(source)],
                *["--eval-iters", str(options.eval_iters)],
                *["--valid-data-path", str(source / "data/valid_text_document")],
                *["--load", str(folder / "pruned"), "--teacher-load", teacher],
                *["--save", str(folder / "evaluation")],
            ],
            folder,
        )
    (line,) = (folder / "evaluation/metrics.jsonl").read_text().splitlines()
    return json.loads(line)


def call(program: str, arguments: list[str], folder: Path) -> None:
    """Run a program in one process, its output in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{Path(program).stem}.log"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "99999999999",
    }
    with log.open("w") as file:
        code = subprocess.run(
            [sys.executable, str(ROOT / program), *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        ).returncode
    if code:
        lines = log.read_text().splitlines()
        last = next((line for line in reversed(lines) if line.startswith("ERROR: ")), lines[-1])
        raise UserError(f"{program} ended with code {code}: {last} ({log})", RUNTIME)


def write(losses: dict[str, dict[str, float]], layers: list[list[float]], folder: Path) -> None:
    """Write results.md, best first, and results.png."""
    ranked = sorted(losses, key=lambda name: losses[name][LM])
    rows = [(name, losses[name][LM], losses[name][KL]) for name in ranked]
    tables = [
        markdown_table(("scores", "validation loss", "KL to the teacher"), rows),
        markdown_table(("layer", *DEPTH), list(zip(itertools.count(), *layers, strict=False))),
    ]
    (folder / "results.md").write_text("\n\n".join(tables) + "\n")
    draw([(name, losses[name][LM]) for name in ranked], folder / "results.png")
    print("\n\n".join(tables))


def draw(ranked: Sequence[tuple[str, float]], path: Path) -> None:
    """Draw the loss of every setting as a point; they are far from 0 and close together."""
    names, values = zip(*reversed(ranked), strict=True)
    figure, (axes,) = new_figure(1, 1)
    axes.hlines(names, min(values), values, color="lightgrey")
    axes.plot(values, names, "o")
    axes.set_xlabel("validation loss right after pruning, nats per token")
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    run_main(main)
