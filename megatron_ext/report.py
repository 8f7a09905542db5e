"""Results: metrics of runs as tables and curves, scores as pictures.

Nothing here knows where a run ran: files in, Markdown and matplotlib Axes out. Axes are an
argument, so that a caller decides what stands beside what.
"""

import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.pruning.scores import Scores
from megatron_ext.runtime.errors import RUNTIME, UserError
from megatron_ext.runtime.extras import need
from megatron_ext.runtime.files import written_aside
from megatron_ext.runtime.texts import parse_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = list[dict[str, float]]
Curve = tuple[list[float], list[float]]


def read_metrics(path: str | os.PathLike) -> Metrics:
    """Return the lines of a run's metrics.jsonl: ``iteration`` and what was measured there.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object with an iteration.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", RUNTIME) from error
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            row["iteration"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}:{number}: not a line of metrics ({error}).", RUNTIME) from None
        metrics.append(row)
    return metrics


def curve(metrics: Metrics, name: str, *, tokens_per_step: int = 1) -> Curve:
    """Return the points of one metric: steps, or with ``tokens_per_step`` tokens, and values."""
    rows = [row for row in metrics if name in row]
    return [row["iteration"] * tokens_per_step for row in rows], [row[name] for row in rows]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table whose first column is text and whose others are numbers, aligned.

    None is written as "-", an int with thousands separators, a float with three digits.
    """
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    assert all(len(row) == len(header) for row in cells), "rows and header differ in length"
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        for row in cells
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def new_figure(rows: int, columns: int) -> "tuple[Figure, Sequence[Axes]]":
    """Return a figure without a window and its rows * columns Axes, row by row."""
    picture = need("matplotlib.figure", "plot", "a picture")
    figure = picture.Figure(figsize=(5.2 * columns, 3.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def plot_curves(
    axes: "Axes", curves: Mapping[str, Curve], *, title: str, x: str, y: str, log: bool = False
) -> None:
    """Draw one line per curve; a curve of one point is a marker.

    With ``log``, values of 0 and below are left out: a logarithm has no place for them.
    """
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20M, not 2 and 1e7 far from it
    for name, (xs, ys) in curves.items():
        shown = [i for i, value in enumerate(ys) if value > 0 or not log]
        points = [xs[i] for i in shown], [ys[i] for i in shown]
        axes.plot(*points, marker="o", markersize=3, label=name)
    if log:
        axes.set_yscale("log")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def score_axes(scores: Scores) -> list[str]:
    """Return the axes with ranked units that ``scores`` have: hidden, heads, ffn, experts, ..."""
    names = dict.fromkeys(name.split(".")[0] for name in scores.vectors)
    return [name for name in names if not name.startswith("layer")]


def plot_ranked_scores(
    axes: "Axes", scores: Scores, axis: str, *, num_kept: int | None = None
) -> None:
    """Draw the scores of one of ``score_axes`` from high to low, over their mean.

    There is a line per layer where each layer has its own units, of all its experts together for
    the neurons of experts. What stands right of the vertical line was removed.
    """
    rows: dict[str, list[Any]] = {}
    for name, vector in scores.vectors.items():
        if name.split(".")[0] == axis:
            rows.setdefault(".".join(name.split(".")[:2]), []).append(vector / vector.mean())
    for number, (name, vectors) in enumerate(rows.items()):
        ranked = sorted((value for vector in vectors for value in vector.tolist()), reverse=True)
        axes.plot(ranked, color=_shade(number, len(rows)), label=name)
    values = [value for line in axes.lines for value in line.get_ydata() if value > 0]
    if max(values, default=1) > 10 * min(values, default=1):
        axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    shown = [axes.lines[0], *axes.lines[1:][-1:]]  # the lines between are shades between
    if num_kept is not None:
        label = f"{num_kept} kept"
        shown += [axes.axvline(num_kept - 0.5, color="black", linestyle="--", label=label)]
    axes.set(title=f"scores of {axis}, ranked", xlabel="rank", ylabel="score / mean")
    axes.grid(alpha=0.3)
    axes.legend(handles=shown, fontsize="small")


def _shade(number: int, count: int) -> Any:
    """Return the colour of a layer: dark for the first, light for the last."""
    from matplotlib import colormaps

    return colormaps["viridis"](number / max(1, count - 1) * 0.9)


def plot_scores(scores: Scores, path: str | os.PathLike) -> None:
    """Write a picture, one panel per axis and one for the layers; its format is the ending."""
    names = score_axes(scores)
    columns = math.ceil(math.sqrt(len(names) + 1))
    figure, axes = new_figure(math.ceil((len(names) + 1) / columns), columns)
    for panel, name in zip(axes, names, strict=False):
        plot_ranked_scores(panel, scores, name)
    plot_layer_scores(axes[len(names)], scores)
    for panel in axes[len(names) + 1 :]:
        panel.set_axis_off()
    how = f"{scores.aggregation}; {scores.samples} samples of {scores.seq_length} tokens"
    figure.suptitle(how, fontsize="medium")
    with written_aside(path) as aside:
        figure.savefig(aside, format=Path(path).suffix.removeprefix("."), dpi=120)


def plot_layer_scores(axes: "Axes", scores: Scores) -> None:
    """Draw the score of every layer: by default 1 - cosine of its input and output."""
    values = scores.vectors["layers"].tolist()
    axes.bar(range(len(values)), values)
    is_block = scores.depth.startswith("block")
    title, unit = (
        ("block importance", "1 - cos(input, output)") if is_block else ("layers", "score")
    )
    axes.set(title=title, xlabel="layer", ylabel=unit)
    axes.set_xticks(range(0, len(values), -(-len(values) // 16)))
    axes.grid(alpha=0.3, axis="y")


def times_table(folder: Path) -> str:
    """Return the seconds of every step, of ``folder``/times.tsv: all starts of a step."""
    seconds: dict[str, int] = {}
    for line in (folder / "times.tsv").read_text().splitlines():
        name, value = line.split("\t")
        seconds[name] = seconds.get(name, 0) + int(value)
    rows = [*seconds.items(), ("all", sum(seconds.values()))]
    return markdown_table(["step", "seconds"], rows)


def machine_lines(root: Path, own_version: str, settings: Mapping[str, str]) -> str:
    """Return machine, date, commit of ``root``, versions and settings as a list."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    versions += f", megatron-minitron {own_version}"
    rows = [
        ["CPU", f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores"],
        ["date", f"{datetime.now():%F %R}"],
        ["commit", commit(root)],
        ["versions", f"Python {platform.python_version()}, {versions}"],
        ["settings", " ".join(f"{key}={value}" for key, value in settings.items())],
    ]
    return "\n".join(f"* {name}: {value}" for name, value in rows)


def cpu_model() -> str:
    """Return the processor's name as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def commit(root: Path) -> str:
    """Return the commit of the repository around ``root``, and if files differ from it."""
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.decode().strip() + " with changes" * bool(changes.stdout.strip())
