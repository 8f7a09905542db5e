"""Prune one teacher by eleven kinds of scores and measure the loss right after, without training.

    bash examples/quickstart/run.sh                     # makes the teacher, the data and .venv
    .venv/bin/python examples/importance/run.py [--quickstart runs/quickstart] [--jobs 2]

The nine aggregations of Table 11 (arXiv 2407.14679), weight magnitude and random scores (three
seeds), all cut to the shape of the quickstart's student. Writes results.md and results.png.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import RUNTIME, USAGE, UserError, run_main
from megatron_ext.flag_parser import flag, parse
from megatron_ext.report import markdown_table, new_figure

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
SIZES = ["--target-hidden-size", "192", "--target-ffn-hidden-size", "384"]
KL, LM = "kd loss validation", "lm loss validation"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Experiment."""

    quickstart: str = flag("runs/quickstart", "folder of a finished quickstart")
    output: str = flag("runs/importance", "folder of the pruned models and results")
    calibration_samples: int = flag(256, "samples that activations are measured on", at_least=1)
    eval_iters: int = flag(50, "validation batches of 16 samples", at_least=1)
    jobs: int = flag(2, "settings at a time, a core each", at_least=1)


@dataclass(frozen=True, kw_only=True)
class ExperimentFlags:
    """Prune one teacher by eleven kinds of scores."""

    experiment: Experiment


def main(argv: Sequence[str] | None = None) -> None:
    """Run every setting that has no result yet and write the table and the plot."""
    options = parse(ExperimentFlags, argv).experiment
    if not (Path(options.quickstart) / "done" / "teacher").exists():
        raise UserError(
            f"--quickstart {options.quickstart}: no finished teacher; run the quickstart first.",
            USAGE,
        )
    Path(options.output).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        losses = dict(
            zip(SETTINGS, pool.map(lambda name: measure(name, options), SETTINGS), strict=True)
        )
    write(losses, Path(options.output))


def measure(name: str, options: Experiment) -> dict[str, float]:
    """Return KL to the teacher and validation loss of the model pruned by setting ``name``."""
    source, top = Path(options.quickstart), Path(options.output)
    folder = top / name.replace(", ", "-").replace(" ", "-")
    shape = ["--bf16", "--seq-length", "128", "--micro-batch-size", "8", "--num-workers", "0"]
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer"]
    tokenizer += ["--tokenizer-model", str(source / "corpus/tokenizer.model")]
    teacher = str(source / "teacher")
    data = ["--train-data-path", str(source / "data/train_text_document")]
    needs_data = "--importance" not in SETTINGS[name]
    if not (folder / "pruned").exists():
        call(
            "prune.py",
            [
                *SETTINGS[name],
                *SIZES,
                *shape,
                *(data + tokenizer if needs_data else []),
                *["--calibration-samples", str(options.calibration_samples)],
                *["--load", teacher, "--save", str(folder / "pruned")],
            ],
            folder,
        )
    if not (folder / "evaluation/metrics.jsonl").exists():
        call(
            "pretrain_distill.py",
            [
                *["--skip-train", "--global-batch-size", "16", *shape, *tokenizer],
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


def write(losses: dict[str, dict[str, float]], folder: Path) -> None:
    """Write results.md and results.png, best first."""
    ranked = sorted(losses, key=lambda name: losses[name][LM])
    rows = [(name, losses[name][LM], losses[name][KL]) for name in ranked]
    table = markdown_table(("scores", "validation loss", "KL to the teacher"), rows)
    (folder / "results.md").write_text(table + "\n")
    figure, (axes,) = new_figure(1, 1)
    axes.barh(ranked[::-1], [losses[name][LM] for name in ranked[::-1]])
    axes.set_xlabel("validation loss right after pruning, nats per token")
    figure.savefig(folder / "results.png", dpi=110, bbox_inches="tight")
    print(table)


if __name__ == "__main__":
    run_main(main)
