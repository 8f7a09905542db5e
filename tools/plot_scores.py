"""Draw the scores of a file: ranked units of every axis, layer by layer, and the layers.

python tools/plot_scores.py --scores scores.safetensors --out scores.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.cli.parser import REQUIRED, flag, parse
from megatron_ext.report import plot_scores
from megatron_ext.runtime.errors import USAGE, UserError, run_main

FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Plot."""

    scores: str = flag(REQUIRED, "scores file, of prune.py")
    out: str = flag(REQUIRED, "picture to write; .png, .svg or .pdf")


@dataclass(frozen=True, kw_only=True)
class PlotFlags:
    """Draw the scores of a file."""

    plot: Plot


def main(argv: Sequence[str] | None = None) -> None:
    """Write the picture."""
    options = parse(PlotFlags, argv).plot
    if Path(options.out).suffix not in FORMATS:
        raise UserError(f"--out {options.out}: end it in one of {', '.join(FORMATS)}.", USAGE)
    if not Path(options.scores).exists():
        raise UserError(f"--scores {options.scores}: no such file.", USAGE)
    from megatron_ext.pruning.scores_file import load_scores  # with torch

    plot_scores(load_scores(options.scores), options.out)


if __name__ == "__main__":
    run_main(main)
