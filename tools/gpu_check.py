"""Check and measure this project on one GPU; the result is one Markdown table.

    tools/gpu_check.sh [--parts engine,losses] [--output docs/gpu.md]
    tools/gpu_check.sh --device cpu --quick --output -      the same code without a GPU, tiny sizes

Every part runs in a process of its own, every row on its own: what fails says so in its row, and
the exit code is 1. The table replaces what follows the mark in the output file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

MARK = "<!-- written by tools/gpu_check.sh -->"
PARTS = {
    "ceilings": "what the machine can do at most",
    "engine": "Transformer Engine against local layers",
    "fp8": "FP8 against bf16, 50 steps of distillation",
    "losses": "the distillation losses against float64 and plain torch",
    "graphs": "CUDA graphs against eager steps",
    "step": "a distillation step of a 1B student and a 3B teacher",
    "calibration": "importance hooks, share of the bare forward pass",
    "trim": "trimming a checkpoint",
    "programs": "the programs, one after the other",
}
ITSELF = "the part itself"  # the check of a row that says how a part ended, if not well
SECONDS = 400  # of a part, before it counts as failed
Row = dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, write the table; returns the exit code."""
    flags = parse(argv)
    if flags.run_part:
        return run_part(flags)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        into = Path(flags.rows or Path(folder) / "rows.jsonl")
        for part in flags.parts:
            print(f"{part}: {PARTS[part]} ...", file=sys.stderr, flush=True)
            run_in_own_process(part, flags, into)
        append(into, {"minutes": f"{(time.perf_counter() - begin) / 60:.1f}"})
        rows, facts = read(into)
    text = table(rows, facts)
    write(flags.output, text)
    print(text)
    failed = [row for row in rows if row["verdict"].startswith("failed")]
    print(f"{len(rows)} rows, {len(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: the code, not the GPU")
    parser.add_argument("--output", default=str(ROOT / "docs/gpu.md"), help="- for stdout alone")
    parser.add_argument(
        "--rows",
        metavar="FILE",
        help="append rows to FILE as they are found, a line of JSON each; the table holds all of "
        "it, so that a run that was cut short goes on with the missing --parts",
    )
    parser.add_argument("--run-part", help=argparse.SUPPRESS)
    parser.add_argument("--into", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    flags.parts = flags.parts.split(",")
    unknown = [part for part in flags.parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts {unknown[0]}: there are {', '.join(PARTS)}")
    return flags


def run_in_own_process(part: str, flags: argparse.Namespace, into: Path) -> None:
    """Append the rows of a part, and what it says of the machine; a crash is a row too."""
    command = [sys.executable, __file__, "--run-part", part, "--into", str(into)]
    command += ["--device", flags.device, *["--quick"] * flags.quick]
    try:
        done = subprocess.run(command, timeout=SECONDS, stdout=sys.stderr, check=False)
        reason = f"the process ended with code {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        reason = f"not finished after {SECONDS} s"
    if reason:
        append(into, row_of(part, ITSELF, verdict=f"failed: {reason}"))


def append(into: Path, line: Row) -> None:
    """Add a line of JSON to the file ``into``."""
    with into.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(into: Path) -> tuple[list[Row], dict[str, str]]:
    """Return rows and facts; where a row was found twice, the later one."""
    lines = [json.loads(line) for line in into.read_text().splitlines()]
    rows: dict[tuple[str, str], Row] = {}
    facts: dict[str, str] = {}
    for line in lines:
        if "check" not in line:
            facts |= line
            continue
        rows.pop((line["part"], ITSELF), None)  # the part was run again
        rows[line["part"], line["check"]] = line
    return list(rows.values()), facts


def run_part(flags: argparse.Namespace) -> int:
    """Run one part here and append its rows to ``--into`` as they come."""
    from tools.gpu import engine, graphs, losses, programs, setup, steps

    checks = {
        "ceilings": setup.ceiling_checks,
        "engine": engine.engine_checks,
        "fp8": steps.fp8_checks,
        "losses": losses.loss_checks,
        "graphs": graphs.graph_checks,
        "step": steps.step_checks,
        "calibration": programs.calibration_checks,
        "trim": programs.trim_checks,
        "programs": programs.program_checks,
    }[flags.run_part]
    where, into = setup.prepare(flags.device, quick=flags.quick), Path(flags.into)
    append(into, setup.facts(where))
    for row in rows_of(flags.run_part, checks(where)):
        append(into, row)
    return 0


def rows_of(part: str, checks: Sequence) -> list[Row]:
    """Yield a row for each (name, function) of a part; the functions return a ``Found``."""
    from tools.gpu.setup import UnavailableError

    for name, check in checks:
        try:
            found = check()
            verdict = {None: "measured", True: "ok", False: "failed: beyond the limit"}[found.ok]
            yield row_of(part, name, found.result, found.limit, verdict)
        except UnavailableError as reason:
            yield row_of(part, name, verdict=f"not available on this machine: {reason}")
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            text = f"{type(error).__name__} {lines[0]}"[:200]
            yield row_of(part, name, verdict=f"failed: {text}")


def row_of(part: str, check: str, result: str = "", limit: str = "", verdict: str = "") -> Row:
    """Return a row of the table."""
    return {"part": part, "check": check, "result": result, "limit": limit, "verdict": verdict}


def table(rows: Sequence[Row], facts: dict[str, str]) -> str:
    """Return the facts of the machine and the rows as Markdown."""
    columns = ("part", "check", "result", "limit", "verdict")
    lines = [f"* {name}: {value}" for name, value in facts.items()]
    lines += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row[column].replace("|", "/").replace("\n", " ") for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(output: str, text: str) -> None:
    """Put ``text`` behind the mark of the file ``output``, which is made if it is missing."""
    if output == "-":
        return
    path = Path(output)
    head = path.read_text().partition(MARK)[0] if path.exists() else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}{MARK}\n\n{text}\n")


if __name__ == "__main__":
    sys.exit(main())
