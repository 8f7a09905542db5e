"""Sizes, losses and texts of a pruned and distilled model, as report.md and report.png.

python examples/smollm2-135m/report.py best --out runs/smollm2-135m     the best candidate's name
python examples/smollm2-135m/report.py write --out runs/smollm2-135m    the report
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext import __version__
from megatron_ext.arch import num_parameters
from megatron_ext.cli.parser import REQUIRED, flag, parse
from megatron_ext.pruning.plan import Plan, load_plan
from megatron_ext.report import (
    Curve,
    curve,
    machine_lines,
    markdown_table,
    new_figure,
    plot_curves,
    read_metrics,
    times_table,
)
from megatron_ext.runtime.errors import RUNTIME, USAGE, UserError, run_main

KL, LM = "kd loss validation", "lm loss validation"
MEASURES = {
    "lm loss": "loss",
    "kl(teacher || student)": "KL to the teacher",
    "top-1 agreement": "top-1 agreement",
}
# Beginning of a folder's name, and what its model is; {} is what follows.
NAMES = {
    "teacher": "teacher",
    "pruned-": "{}, pruned",
    "magnitude-": "{}, pruned by the weights' norms",
    "distilled-": "{}, distilled",
    "control-random": "random weights, same shape, loss and tokens",
    "control-ce": "pruned, cross entropy in place of KL, same tokens",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run."""

    out: str = flag(REQUIRED, "folder of the run")


@dataclass(frozen=True, kw_only=True)
class ReportFlags:
    """Report on a run of examples/smollm2-135m."""

    run: Run


def main(argv: Sequence[str] | None = None) -> None:
    """Print the best candidate, or write report.md and report.png."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"best": lambda folder: print(best(folder)), "write": write}
    if not argv or argv[0] not in commands:
        raise UserError(f"the first word is one of {', '.join(commands)}.", USAGE)
    commands[argv[0]](Path(parse(ReportFlags, argv[1:]).run.out))


def best(folder: Path) -> str:
    """Return the candidate with the lowest KL at the last evaluation that all of them had."""
    found = {path.name.removeprefix("distilled-"): kl for path, kl in curves(folder, KL).items()}
    found = {name: points for name, points in found.items() if (folder / "pruned" / name).exists()}
    if not found:
        raise UserError(f"{folder}: no candidate has been evaluated yet.", RUNTIME)
    at = max(set.intersection(*(set(steps) for steps, _ in found.values())))
    return min(found, key=lambda name: found[name][1][found[name][0].index(at)])


def write(folder: Path) -> None:
    """Write the report of a finished run."""
    settings = dict(
        line.split("=", 1) for line in (folder / "settings.txt").read_text().splitlines()
    )
    tokens = int(settings["BATCH"]) * int(settings["SEQ_LENGTH"])
    draw(folder, tokens)
    machine = folder / "machine.txt"
    parts = [
        "# A trained model, pruned to half and distilled",
        results_table(folder),
        "![validation curves](report.png)",
        "## What they write, greedily",
        texts(folder),
        "## Wall time",
        times_table(folder),
        "## Where",
        # A run that was made elsewhere says where.
        machine.read_text().rstrip()
        if machine.exists()
        else machine_lines(Path(__file__).parent, __version__, settings),
    ]
    text = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(text)
    print(f"\n{text}\nwritten: {folder / 'report.md'}, {folder / 'report.png'}")


def name_of(folder: str) -> str:
    """Return what the model in a folder is called in the report."""
    for begin, name in NAMES.items():
        if folder.startswith(begin):
            return name.format(folder.removeprefix(begin))
    return folder


def curves(folder: Path, name: str, tokens_per_step: int = 1) -> dict[Path, Curve]:
    """Return the validation curve of every run that has one."""
    found = {}
    # Those without a curve of KL come last: the others have one colour in both pictures.
    for path in sorted(folder.glob("*/metrics.jsonl"), key=lambda path: order(path.parent)):
        points = curve(read_metrics(path), name, tokens_per_step=tokens_per_step)
        if points[0]:
            found[path.parent] = points
    return found


def draw(folder: Path, tokens: int) -> None:
    """Write report.png: KL and loss of the validation text over tokens."""
    figure, axes = new_figure(1, 2)
    titles = {KL: "validation KL to the teacher", LM: "validation loss"}
    for place, (metric, title) in zip(axes, titles.items(), strict=True):
        found = {
            name_of(path.name): points for path, points in curves(folder, metric, tokens).items()
        }
        plot_curves(
            place, found, title=title, x="tokens trained on", y="nats per token", log=metric == KL
        )
    figure.savefig(folder / "report.png", dpi=110)


def results_table(folder: Path) -> str:
    """Return sizes, tokens and measures of every model that was evaluated."""
    plans = {path.stem: load_plan(path) for path in sorted((folder / "plans").glob("*.json"))}
    winner = max(plans, key=lambda name: (folder / f"distilled-{name}").exists())
    if (folder / "winner.txt").exists():
        winner = (folder / "winner.txt").read_text().strip()
    rows = []
    for path in sorted((folder / "evaluations").glob("*.txt"), key=order):
        found = measures(path.read_text())
        name = path.stem.rpartition("-")[2]
        model = sizes(plans, path.stem, name if name in plans else winner)
        rows.append([name_of(path.stem), *model, *(found.get(measure) for measure in MEASURES)])
    header = ["model", "parameters", "outside the embedding", *MEASURES.values()]
    note = "Validation text, nats per token; agreement: positions with the teacher's top token."
    return f"{markdown_table(header, rows)}\n\n{note}"


def order(path: Path) -> tuple[int, str]:
    """Sort models as NAMES has them."""
    places = [number for number, begin in enumerate(NAMES) if path.stem.startswith(begin)]
    return (*places, len(NAMES))[0], path.stem


def sizes(plans: Mapping[str, Plan], stem: str, name: str) -> list[int]:
    """Return the parameters of a model, with and without embeddings."""
    plan = plans[name]
    arch = plan.source if stem == "teacher" else plan.target
    return [num_parameters(arch), num_parameters(arch, embeddings=False)]


def measures(text: str) -> dict[str, float]:
    """Return the lines "name   number" of tools/evaluate.py."""
    lines = (re.fullmatch(r"(\S.*?)\s{2,}([\d.,]+)", line) for line in text.splitlines())
    return {match[1]: float(match[2].replace(",", "")) for match in lines if match}


def texts(folder: Path) -> str:
    """Return what the models wrote, as code blocks."""
    return "\n\n".join(
        f"### {name_of(path.stem)}\n\n````text\n{path.read_text().rstrip()}\n````"
        for path in sorted((folder / "texts").glob("*.txt"), key=order)
    )


if __name__ == "__main__":
    run_main(main)
