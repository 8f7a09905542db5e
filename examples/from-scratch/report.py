"""From-scratch's results as report.md and report.png, also printed.

python examples/from-scratch/report.py --output runs/from-scratch
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext import __version__
from megatron_ext.arch import num_parameters
from megatron_ext.cli.parser import REQUIRED, flag, parse
from megatron_ext.pruning.plan import Plan, load_plan
from megatron_ext.pruning.scores import Scores
from megatron_ext.pruning.scores_file import load_scores
from megatron_ext.report import (
    Curve,
    Metrics,
    curve,
    machine_lines,
    markdown_table,
    new_figure,
    plot_curves,
    plot_layer_scores,
    plot_ranked_scores,
    read_metrics,
    times_table,
)
from megatron_ext.runtime.errors import run_main

KL, LM = "kd loss validation", "lm loss validation"
# Folder of each arm that trains the pruned shape, and what it is called.
ARMS = {
    "distilled": "pruned, KL to the teacher",
    "control-random": "random weights, KL to the teacher",
    "control-ce": "pruned, cross entropy",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """Report."""

    output: str = flag(REQUIRED, "folder of from-scratch's runs")


@dataclass(frozen=True, kw_only=True)
class ReportFlags:
    """Report on from-scratch."""

    report: Report


@dataclass(frozen=True, kw_only=True)
class Results:
    """Settings, plan, scores and metrics of a finished run, read from its folder."""

    folder: Path
    settings: dict[str, str]
    plan: Plan
    scores: Scores
    runs: dict[str, Metrics]
    """Metrics by folder: teacher, each arm, and control-ce-kl, an evaluation."""

    def curve(self, run: str, name: str) -> Curve:
        """Return the points of a metric over the tokens of ``run``."""
        tokens = int(self.settings["BATCH"]) * int(self.settings["SEQ_LENGTH"])
        return curve(self.runs[run], name, tokens_per_step=tokens)

    def kl(self, arm: str) -> Curve:
        """Return the KL to the teacher over the tokens of ``arm``.

        Cross entropy trains without a teacher: its KL is known before and after.
        """
        if arm != "control-ce":
            return self.curve(arm, KL)
        tokens, _ = self.curve(arm, LM)
        before, after = self.curve("distilled", KL)[1][0], self.curve("control-ce-kl", KL)[1][-1]
        return [tokens[0], tokens[-1]], [before, after]


def main(argv: Sequence[str] | None = None) -> None:
    """Write report.md and report.png and print the first."""
    results = load(Path(parse(ReportFlags, argv).report.output))
    draw(results)
    text = "\n\n".join(
        [
            "# From scratch: a teacher, its pruned half, and three ways to train that",
            results_table(results),
            findings(results),
            "![curves and scores](report.png)",
            "## What they write",
            texts(results.folder),
            "## Wall time, seconds",
            times_table(results.folder),
            "## Where",
            machine_lines(Path(__file__).parent, __version__, results.settings),
        ]
    )
    (results.folder / "report.md").write_text(text + "\n")
    print(f"\n{text}\n\nwritten: {results.folder / 'report.md'}, {results.folder / 'report.png'}")


def load(folder: Path) -> Results:
    """Read the folder of a finished run of examples/from-scratch."""
    lines = (folder / "settings.txt").read_text().splitlines()
    return Results(
        folder=folder,
        settings=dict(line.split("=", 1) for line in lines),
        plan=load_plan(folder / "plan.json"),
        scores=load_scores(folder / "scores.safetensors"),
        runs={
            run: read_metrics(folder / run / "metrics.jsonl")
            for run in ("teacher", *ARMS, "control-ce-kl")
        },
    )


def results_table(results: Results) -> str:
    """Return parameters, tokens, KL and loss of every model, before and after its training."""

    def sizes(arch: object) -> list[int]:
        return [num_parameters(arch), num_parameters(arch, embeddings=False)]

    source, target = sizes(results.plan.source), sizes(results.plan.target)
    tokens, loss = results.curve("teacher", LM)
    kl_untouched, loss_untouched = (results.curve("distilled", name)[1][0] for name in (KL, LM))
    rows = [
        ["teacher", *source, tokens[-1], None, 0.0, loss[0], loss[-1]],
        ["pruned, untouched", *target, 0, kl_untouched, None, loss_untouched, None],
    ]
    for arm, name in ARMS.items():
        (tokens, kl), (_, loss) = results.kl(arm), results.curve(arm, LM)
        rows.append([name, *target, tokens[-1], kl[0], kl[-1], loss[0], loss[-1]])
    header = ["model", "parameters", "non-embedding", "tokens"]
    header += ["KL before", "KL after", "loss before", "loss after"]
    note = (
        "KL(teacher ‖ model) and language-model loss are of the validation text, in nats per "
        "token, before and after training on so many tokens."
    )
    return f"{markdown_table(header, rows)}\n\n{note}"


def findings(results: Results) -> str:
    """Say in sentences what the numbers show, whichever way they came out."""
    kl = {arm: results.kl(arm)[1] for arm in ARMS}
    loss = {arm: results.curve(arm, LM)[1] for arm in ARMS}
    tokens, teacher = results.curve("teacher", LM)

    def compare(arm: str, curves: dict[str, list[float]]) -> str:
        ours, theirs = curves["distilled"][-1], curves[arm][-1]
        word = "lower" if ours < theirs else "higher" if ours > theirs else "the same"
        return f"{word} ({ours:.3f} against {theirs:.3f})"

    sentences = [
        f"Pruning to {results.plan.target.hidden_size} channels and "
        f"{results.plan.target.ffn_hidden_size} neurons moved the loss from {teacher[-1]:.3f} to "
        f"{loss['distilled'][0]:.3f}; distillation brought it to {loss['distilled'][-1]:.3f}, and "
        f"the KL from {kl['distilled'][0]:.3f} to {kl['distilled'][-1]:.3f}.",
        "Against the same shape from random weights, with the same loss on the same tokens, the "
        f"distilled student's KL is {compare('control-random', kl)} and its loss is "
        f"{compare('control-random', loss)}.",
        "Against the same pruned weights trained with cross entropy on the same tokens, its KL is "
        f"{compare('control-ce', kl)} and its loss is {compare('control-ce', loss)}.",
        f"In its last {tokens[-1] - tokens[-2]:,} tokens the teacher's loss fell by "
        f"{teacher[-2] - teacher[-1]:.3f}: a student can learn from the text, and not from its "
        "teacher, what the teacher does not know yet. One seed; small differences mean nothing.",
    ]
    return "\n".join(f"* {sentence}" for sentence in sentences)


def draw(results: Results) -> None:
    """Write report.png."""
    figure, axes = new_figure(2, 3)
    tokens = {"x": "tokens trained on", "y": "nats per token"}
    kls = {name: results.kl(arm) for arm, name in ARMS.items()}
    plot_curves(axes[0], kls, title="validation KL to the teacher", log=True, **tokens)
    losses = {name: results.curve(arm, LM) for arm, name in ARMS.items()}
    plot_curves(axes[1], losses, title="validation loss", **tokens)
    axes[1].axhline(results.curve("teacher", LM)[1][-1], color="black", linestyle=":")
    teacher = {"teacher": results.curve("teacher", LM)}
    plot_curves(axes[2], teacher, title="validation loss of the teacher", **tokens)
    for place, (axis, size) in zip(
        axes[3:5], {"hidden": "hidden_size", "ffn": "ffn_hidden_size"}.items(), strict=True
    ):
        kept = getattr(results.plan.target, size)
        plot_ranked_scores(place, results.scores, axis, num_kept=kept)
    plot_layer_scores(axes[5], results.scores)
    figure.savefig(results.folder / "report.png", dpi=110)


def texts(folder: Path) -> str:
    """Return what the models wrote, as code blocks."""
    blocks = []
    for model in ("teacher", "pruned", "distilled"):
        text = (folder / "texts" / f"{model}.txt").read_text().rstrip()
        blocks.append(f"### {model}\n\n````text\n{text}\n````")
    return "\n\n".join(blocks)


if __name__ == "__main__":
    run_main(main)
