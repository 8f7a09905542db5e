"""Data of the two tasks in tasks/, of from-scratch's validation text. No network.

    python examples/lm_eval/tasks.py --corpus runs/from-scratch/corpus --output DIR

next_line (DIR/next_line.yaml and .jsonl): ten lines of Python and four that may follow, one of
which does; the others follow elsewhere in the text. python_text: the first lines of documents. The
same bytes each time.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.cli.parser import REQUIRED, flag, parse
from megatron_ext.runtime.errors import run_main

NUM_LINES, NUM_CHOICES, MIN_CHARACTERS = 10, 4, 20


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks."""

    corpus: str = flag(REQUIRED, "folder of examples/from-scratch/corpus.py")
    output: str = flag(REQUIRED, "folder to write")
    samples: int = flag(60, "questions, and documents", at_least=4)


@dataclass(frozen=True, kw_only=True)
class TasksFlags:
    """Write the data of two tasks for lm_eval."""

    tasks: Tasks


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tasks."""
    options = parse(TasksFlags, argv).tasks
    lines = (Path(options.corpus) / "valid.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    output = Path(options.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    rows = {
        "next_line": questions(texts, options.samples),
        "python_text": [
            {"text": "\n".join(text.splitlines()[:40])} for text in texts[: options.samples]
        ],
    }
    for name, found in rows.items():
        data = output / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in found))
        task = (Path(__file__).parent / f"tasks/{name}.yaml").read_text()
        # lm_eval looks for data from where it was started.
        (output / f"{name}.yaml").write_text(task.replace(data.name, str(data)))
        print(f"{output / name}.yaml: {len(found)} samples")


def questions(texts: Sequence[str], count: int) -> list[dict]:
    """Return questions: context, choices and the number of the right one."""
    found = [pair for text in texts for pair in pairs(text)]
    rng = random.Random(0)
    chosen = rng.sample(found, min(count, len(found)))
    rows = []
    for context, line in chosen:
        others = rng.sample([other for _, other in chosen if other != line], NUM_CHOICES - 1)
        label = rng.randrange(NUM_CHOICES)
        choices = [*others[:label], line, *others[label:]]
        rows.append({"context": context, "choices": choices, "label": label})
    return rows


def pairs(text: str) -> Iterator[tuple[str, str]]:
    """Yield lines of ``text`` and the one behind them, where it says something."""
    lines = text.splitlines(keepends=True)
    for end in range(NUM_LINES, len(lines), NUM_LINES):
        if len(lines[end].strip()) >= MIN_CHARACTERS:
            yield "".join(lines[end - NUM_LINES : end]), lines[end]


if __name__ == "__main__":
    run_main(main)
