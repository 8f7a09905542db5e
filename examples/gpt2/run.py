"""GPT-2 at its real size through the whole path on two cores, each step measured.

    python examples/gpt2/run.py [--output runs/gpt2]

Sizes and vocabulary are GPT-2's (124M parameters, 50257 tokens). Weights are random and the
tokenizer is trained here: both would have to be downloaded. So the figures are those of the
machinery, and say nothing of quality. Started again, it goes on after the last finished step.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRUNED = {"hidden_size": 512, "ffn_hidden_size": 2048, "num_attention_heads": 8, "num_layers": 8}
SEQ_LENGTH, EVAL_SAMPLES, STEPS = 256, 16, 10
RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@dataclass(frozen=True)
class Paths:
    """Paths below the output folder."""

    root: Path

    def __getattr__(self, name: str) -> str:
        return str(self.root / name)


def main() -> None:
    """Run every step that has no result yet, check the exported model, write results.md."""
    root = Path(sys.argv[2] if sys.argv[1:2] == ["--output"] else ROOT / "runs/gpt2").absolute()
    root.mkdir(parents=True, exist_ok=True)
    at = Paths(root)
    for name, command in commands(at).items():
        done = root / f"{name}.json"
        if not done.exists():
            print(f"=== {name}", flush=True)
            done.write_text(json.dumps(measure(command, root / f"{name}.log")))
    losses = [json.loads((root / f"{name}.json").read_text()) for name in ("loss", "hf-loss")]
    difference = abs(losses[0]["lm loss"] - losses[1]["lm loss"])
    assert difference < 1e-4, f"transformers computes another loss: {losses}"
    (root / "results.md").write_text(report(at))
    print(report(at))


def commands(at: Paths) -> dict[str, Sequence[str]]:
    """Return the command of each step, in order."""
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", at.hf]
    shape = ["--seq-length", str(SEQ_LENGTH), "--micro-batch-size", "2"]
    data = ["--train-data-path", at.train_text_document, "--num-workers", "0", *tokenizer]
    targets = [f"--target-{k.replace('_', '-')}={v}" for k, v in PRUNED.items()]
    corpus = ["examples/from-scratch/corpus.py", "--output", at.corpus]

    def preprocess(name: str) -> list[str]:
        source = str(at.root / f"corpus/{name}.jsonl")
        prefix = ["--input", source, "--output-prefix", str(at.root / name), "--append-eod"]
        return ["tools/preprocess_data.py", *prefix, *tokenizer]

    return {
        "corpus": corpus,
        "model": ["examples/gpt2/model.py", "--corpus", at.corpus, "--hf", at.hf],
        "preprocess": preprocess("train"),
        "preprocess-valid": preprocess("valid"),
        "import": ["tools/convert.py", "import", "--hf", at.hf, "--save", at.teacher],
        "prune": [
            *RANKS,
            "prune.py",
            *["--load", at.teacher, "--save", at.pruned, *data, *shape, *targets],
            *["--calibration-samples", "32", "--tensor-model-parallel-size", "1"],
        ],
        "distil": [
            *RANKS,
            "pretrain_distill.py",
            *["--load", at.pruned, "--teacher-load", at.teacher, "--save", at.student],
            *["--save-interval", str(STEPS), "--train-iters", str(STEPS), "--lr", "6e-4"],
            *["--global-batch-size", "8", "--log-interval", "1", "--eval-iters", "0"],
            *[*data, *shape, "--finetune", "--no-save-optim"],
        ],
        "evaluate": [
            "tools/evaluate.py",
            *["--load", at.student, "--data-path", at.valid_text_document, *tokenizer, *shape],
            *["--eval-samples", str(EVAL_SAMPLES), "--num-workers", "0"],
            *["--json", str(at.root / "loss.json")],
        ],
        "export": ["tools/convert.py", "export", "--load", at.student, "--hf", at.exported],
        "transformers": [
            "examples/gpt2/check.py",
            *["--hf", at.exported, "--data-path", at.valid_text_document],
            *["--seq-length", str(SEQ_LENGTH), "--samples", str(EVAL_SAMPLES)],
            *["--json", str(at.root / "hf-loss.json")],
        ],
    }


def measure(command: Sequence[str], log: Path) -> dict[str, float]:
    """Run a Python command; return its seconds and the peak memory of its largest process."""
    began = time.monotonic()
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    if command[: len(RANKS)] == list(RANKS):
        environment["OMP_NUM_THREADS"] = "1"  # the ranks have a core each
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"ERROR: {' '.join(command)}\n{log.read_text()[-2000:]}")
    return {"seconds": time.monotonic() - began, "GiB": usage.ru_maxrss / 2**20}


def report(at: Paths) -> str:
    """Return the figures as Markdown."""
    read: Callable[[str], dict] = lambda name: json.loads((at.root / f"{name}.json").read_text())  # noqa: E731
    rows = ["| step | seconds | peak GiB of a process |", "|---|---|---|"]
    for name in commands(at):
        figures = read(name)
        rows.append(f"| {name} | {figures['seconds']:.0f} | {figures['GiB']:.2f} |")
    counts = [
        Path(at.root / f"{name}.log").read_text().split(":")[-1].split()[0]
        for name in ("import", "export")
    ]
    loss, other = read("loss")["lm loss"], read("hf-loss")["lm loss"]
    logged = (at.root / "student/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in logged if '"kd loss"' in line]
    rows += [
        "",
        f"Parameters: {counts[0]} before, {counts[1]} after pruning.",
        f"KL of step 1: {steps[0]['kd loss']:.4f}, of step {len(steps)}: "
        f"{steps[-1]['kd loss']:.4f}.",
        f"Validation loss of the student: {loss:.6f} here, {other:.6f} in transformers.",
    ]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
