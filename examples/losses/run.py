"""Retrain from-scratch's pruned students with every loss, alone and with cross entropy.

    bash examples/from-scratch/run.sh                     # makes the teacher, the data and .venv
    .venv/bin/python examples/losses/run.py [--from-scratch runs/from-scratch] [--jobs 2]

The questions of Tables 14 to 17 (arXiv 2407.14679) in small: two students, one cut in width and one
to half of the layers, the same steps and data for every loss. All are judged by the validation loss
and by forward KL to the teacher; what the paper's claims rest on, with three seeds. Writes
results.md.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.importance.run import KL, LM, SIZES, call
from megatron_ext.cli.parser import flag, parse
from megatron_ext.report import markdown_table
from megatron_ext.runtime.errors import USAGE, UserError, run_main

WITH_CE = ["--kd-lm-loss-weight", "1"]
STUDENTS = {"width": SIZES, "depth": ["--target-num-layers", "2"]}
KINDS = ("forward-kl", "reverse-kl", "jsd", "mse", "cosine")
# name: flags; the first has no teacher.
LOSSES = {
    "cross entropy": None,
    **{kind: ["--kd-loss", kind] for kind in KINDS},
    **{f"{kind} + cross entropy": ["--kd-loss", kind, *WITH_CE] for kind in KINDS},
    **{f"forward-kl, temperature {t}": ["--kd-temperature", t] for t in ("0.5", "3")},
    "forward-kl, temperature 3, squared": ["--kd-temperature", "3", "--kd-temperature-squared"],
    **{f"forward-kl, top {k}": ["--kd-top-k", k] for k in ("8", "64", "512")},
    "forward-kl, top 8 and tail": ["--kd-top-k", "8", "--kd-top-k-rest", "tail"],
}
HIDDEN = {
    "forward-kl, blocks 2:0": ["--kd-hidden-states", "2:0"],
    "forward-kl, blocks 2:0, embedding": ["--kd-hidden-states", "2:0,embedding"],
    "forward-kl, blocks 3:1 (the last)": ["--kd-hidden-states", "3:1"],
    "forward-kl, blocks 3:1, embedding": ["--kd-hidden-states", "3:1,embedding"],
}
RUNS = {
    "width": [*LOSSES, "forward-kl, blocks 2:2, embedding"],
    "depth": ["cross entropy", "forward-kl", "reverse-kl", "forward-kl + cross entropy", *HIDDEN],
}
# Seeds of the order of the data; the first is the default.
SEEDS = ("1234", "1", "2")
REPEATED = {
    "width": ["cross entropy", *KINDS, "forward-kl + cross entropy", RUNS["width"][-1]],
    "depth": RUNS["depth"],
}
FLAGS = LOSSES | HIDDEN | {RUNS["width"][-1]: ["--kd-hidden-states", "2:2,embedding"]}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Experiment."""

    from_scratch: str = flag("runs/from-scratch", "folder of a finished examples/from-scratch")
    output: str = flag("runs/losses", "folder of the students and results")
    train_iters: int = flag(150, "steps of 16 samples of 128 tokens", at_least=1)
    eval_iters: int = flag(50, "validation batches of 16 samples", at_least=1)
    jobs: int = flag(2, "runs at a time, a core each", at_least=1)


@dataclass(frozen=True, kw_only=True)
class ExperimentFlags:
    """Retrain pruned students with every loss."""

    experiment: Experiment


def main(argv: Sequence[str] | None = None) -> None:
    """Run everything that has no result yet and write the table."""
    options = parse(ExperimentFlags, argv).experiment
    if not (Path(options.from_scratch) / "done" / "teacher").exists():
        raise UserError(
            f"--from-scratch {options.from_scratch}: no finished teacher; run from-scratch first.",
            USAGE,
        )
    for student in STUDENTS:
        prune(student, options)
    runs = [
        (student, name, seed)
        for seed in SEEDS
        for student, names in (RUNS if seed == SEEDS[0] else REPEATED).items()
        for name in names
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = dict(zip(runs, pool.map(lambda run: measure(*run, options), runs), strict=True))
    tables = [table(student, results) for student in STUDENTS]
    (Path(options.output) / "results.md").write_text("\n\n".join(tables) + "\n")
    print("\n\n".join(tables))


def table(student: str, results: Mapping[tuple[str, str, str], Mapping[str, float]]) -> str:
    """Return the means over seeds of a student's losses as Markdown, best first."""
    rows = []
    for name in RUNS[student]:
        found = [results[run] for seed in SEEDS if (run := (student, name, seed)) in results]
        losses = [result[LM] for result in found]
        kl = sum(result[KL] for result in found) / len(found)
        spread = f"{max(losses) - min(losses):.3f}" if len(found) > 1 else ""
        rows.append((name, sum(losses) / len(losses), kl, len(found), spread))
    rows.sort(key=lambda row: row[1])
    header = (f"loss, student cut in {student}", "validation loss", "KL to the teacher")
    return markdown_table((*header, "seeds", "largest - smallest loss"), rows)


def shared(options: Experiment) -> list[str]:
    """Return the flags of samples and tokenizer."""
    model = str(Path(options.from_scratch) / "corpus/tokenizer.model")
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    shape = ["--bf16", "--seq-length", "128", "--micro-batch-size", "8", "--num-workers", "0"]
    return [*shape, *tokenizer]


def train_data(options: Experiment) -> list[str]:
    """Return the flags of the training data."""
    return ["--train-data-path", str(Path(options.from_scratch) / "data/train_text_document")]


def prune(student: str, options: Experiment) -> None:
    """Make a student of the teacher, with from-scratch's calibration."""
    folder = Path(options.output) / student
    if not (folder / "pruned/release").exists():
        teacher = str(Path(options.from_scratch) / "teacher")
        where = ["--load", teacher, "--save", str(folder / "pruned")]
        samples = ["--calibration-samples", "256", *shared(options), *train_data(options)]
        call("prune.py", [*where, *samples, *STUDENTS[student]], folder)


def measure(student: str, name: str, seed: str, options: Experiment) -> dict[str, float]:
    """Return validation loss and KL to the teacher of ``student`` retrained with a loss."""
    pruned = Path(options.output) / student / "pruned"
    words = name if seed == SEEDS[0] else f"{name}, seed {seed}"
    folder = pruned.parent / words.replace(", ", "-").replace(" ", "-").replace(":", "")
    teacher = ["--teacher-load", str(Path(options.from_scratch) / "teacher")]
    steps, warmup = str(options.train_iters), str(max(1, options.train_iters // 8))
    if not (folder / "student/latest_checkpointed_iteration.txt").exists():
        schedule = ["--train-iters", steps, "--save-interval", steps, "--lr-warmup-iters", warmup]
        schedule += ["--lr", "2e-3", "--min-lr", "2e-4", "--lr-decay-style", "cosine"]
        adam = ["--adam-beta2", "0.95", "--weight-decay", "0.1", "--global-batch-size", "16"]
        where = ["--load", str(pruned), "--save", str(folder / "student"), "--eval-iters", "0"]
        flags = FLAGS[name]
        loss = [*teacher, *flags] if flags is not None else []
        data = [*shared(options), *train_data(options), "--seed", seed]
        argv = [*data, *schedule, *adam, *where, *loss]
        call("pretrain_distill.py", argv, folder)
    if not (folder / "evaluation/metrics.jsonl").exists():
        valid = str(Path(options.from_scratch) / "data/valid_text_document")
        where = ["--load", str(folder / "student"), "--save", str(folder / "evaluation")]
        evaluate = ["--skip-train", "--global-batch-size", "16", "--valid-data-path", valid]
        evaluate += ["--eval-iters", str(options.eval_iters), "--no-load-optim", "--no-load-rng"]
        call("pretrain_distill.py", [*shared(options), *evaluate, *where, *teacher], folder)
    (line,) = (folder / "evaluation/metrics.jsonl").read_text().splitlines()
    return json.loads(line)


if __name__ == "__main__":
    run_main(main)
