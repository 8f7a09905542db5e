"""Results of the hybrid example as a table.

python examples/hybrid/report.py --output runs/hybrid
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.arch import num_parameters
from megatron_ext.checkpoint import checkpoints
from megatron_ext.cli.parser import REQUIRED, flag, parse
from megatron_ext.report import markdown_table, read_metrics
from megatron_ext.runtime.errors import run_main

KL, LM = "kd loss validation", "lm loss validation"
# Folder of an arm's run, what it is called, and the folder of its sizes.
ARMS = {
    "teacher": ("teacher", "teacher"),
    "pruned-untouched": ("pruned, untouched", "pruned"),
    "chance-untouched": ("pruned by chance, untouched", "chance"),
    "pruned-distilled": ("pruned, distilled", "pruned"),
    "chance-distilled": ("pruned by chance, distilled", "chance"),
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """Report."""

    output: str = flag(REQUIRED, "folder of the example's runs")


@dataclass(frozen=True, kw_only=True)
class ReportFlags:
    """Report on the hybrid example."""

    report: Report


def main(argv: Sequence[str] | None = None) -> None:
    """Print validation losses of every arm, the last of each."""
    folder = Path(parse(ReportFlags, argv).report.output)
    rows = []
    for name, (words, shape) in ARMS.items():
        arch = checkpoints.read(str(folder / shape)).arch
        lines = [x for x in read_metrics(folder / name / "metrics.jsonl") if LM in x]
        rows.append([words, num_parameters(arch), arch.pattern, *map(lines[-1].get, (KL, LM))])
    header = ["model", "parameters", "sub-layers", "KL to the teacher", "loss"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    run_main(main)
