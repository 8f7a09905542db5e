r"""Retrain every candidate of a search briefly and rank them by what they are then.

    prune.py ... --target-params 4e9 --search-space space.yaml --save candidates
    python tools/rank_candidates.py --candidates candidates --teacher-load teacher --save ranked \
        --launch "torchrun --nproc-per-node 8" -- \
        --data-path corpus ... --train-iters 400 --eval-interval 50

What follows ``--`` are flags of pretrain_distill.py, the same for all. Ranks before retraining say
little (arXiv:2407.14679, section 3): ranking.md shows each candidate's loss before and after, and
how far the order at each evaluation agrees with the last. Started again, it goes on where it was.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_ext.arch import Arch, num_parameters
from megatron_ext.arch.axes import sizes_of
from megatron_ext.checkpoint.quick_read import glance
from megatron_ext.checkpoint.unpickling import trust
from megatron_ext.cli.megatron_flags import trust_flag
from megatron_ext.cli.parser import REQUIRED, dashed, flag, parse, read
from megatron_ext.cli.programs import OTHERS_IN_TRAINING, TrainFlags
from megatron_ext.report import curve, markdown_table, new_figure, plot_curves, read_metrics
from megatron_ext.runtime.errors import CHECKPOINT, INTERRUPTED, RUNTIME, USAGE, UserError, run_main
from megatron_ext.runtime.extras import need
from megatron_ext.runtime.files import written_aside
from megatron_ext.runtime.signals import StopSignals

PROGRAM = Path(__file__).parents[1] / "pretrain_distill.py"
LOSS, KL = "lm loss validation", "kd loss validation"


@dataclass(frozen=True, kw_only=True)
class Search:
    """Search."""

    candidates: str = flag(REQUIRED, "folder with a pruned checkpoint in each folder below")
    teacher_load: str = flag(REQUIRED, "folder of the teacher's checkpoint")
    save: str = flag(REQUIRED, "folder of the retrained candidates and of the ranking")
    launch: str = flag(
        sys.executable, "what starts the program, e.g. torchrun --nproc-per-node 8; default python"
    )
    trust_checkpoint: bool = trust_flag()


@dataclass(frozen=True, kw_only=True)
class SearchFlags:
    """Retrain candidates and rank them. After --, flags of pretrain_distill.py."""

    search: Search


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A retrained candidate."""

    name: str
    sizes: dict[str, int]
    """Sizes that were cut of the teacher, by Megatron's names."""
    parameters: int
    iterations: list[int]
    """Iterations of the evaluations; the first is before retraining."""
    losses: list[float]
    """Language-model loss there, nats per token."""
    kl: list[float]
    """KL to the teacher there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Retrain what is not yet retrained, write the ranking and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    where = argv.index("--") if "--" in argv else len(argv)
    own, rest = argv[:where], argv[where + 1 :]
    options = parse(SearchFlags, own).search
    check_training_flags(rest)
    need("matplotlib", "plot", "ranking.png")  # found out now, not after the last candidate
    trust(options.trust_checkpoint)
    teacher = glance(options.teacher_load).arch
    archs = find_candidates(options.candidates)
    with StopSignals() as stop:
        for number, name in enumerate(archs, 1):
            print(f"=== {name} ({number} of {len(archs)})", flush=True)
            if not retrain(options, name, rest, stop):
                print("stopped; start again to go on", file=sys.stderr)
                return INTERRUPTED
    found = [load(options.save, name, arch, teacher) for name, arch in archs.items()]
    write(Path(options.save), found)
    return 0


def check_training_flags(rest: Sequence[str]) -> None:
    """Refuse flags without which there is nothing to rank, or that this program gives itself."""
    typed = read(TrainFlags, rest, OTHERS_IN_TRAINING)
    for name in ("load", "save", "teacher_load", "trust_checkpoint"):
        if name in typed:
            raise UserError(
                f"{dashed(name)} stands before the --: this program reads it too.", USAGE
            )
    if not typed.get("eval_interval") or typed.get("eval_iters") == 0:
        raise UserError("after --: candidates are ranked by evaluations: --eval-interval.", USAGE)


def find_candidates(folder: str) -> dict[str, Arch]:
    """Return the sizes of every checkpoint one folder below ``folder``, by name."""
    paths = sorted(path for path in Path(folder).glob("*") if path.is_dir())
    found = {path.name: glance(str(path)).arch for path in paths}
    if len(found) < 2:
        raise UserError(
            f"--candidates {folder}: {len(found)} checkpoints below; 2 make a choice.", CHECKPOINT
        )
    return found


def retrain(options: Search, name: str, rest: Sequence[str], stop: StopSignals) -> bool:
    """Run the training program of one candidate; returns whether it came to its end.

    Raises:
        UserError: it failed.
    """
    command = [*shlex.split(options.launch), str(PROGRAM), "--load", f"{options.candidates}/{name}"]
    command += ["--save", f"{options.save}/{name}", "--teacher-load", options.teacher_load]
    command += ["--trust-checkpoint"] * options.trust_checkpoint
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "code"  # torchrun returns 1, whatever its ranks return
        code = run_until_told([*command, *rest], {"EXIT_CODE_FILE": str(said)}, stop)
        if said.exists():
            code = int(said.read_text())
        elif stop.caught and code:
            code = INTERRUPTED  # it was loading, and did not listen yet
    if code not in (0, INTERRUPTED):
        raise UserError(f"candidate {name} ended with code {code}; see above.", RUNTIME)
    return not code and not stop.caught


def run_until_told(command: Sequence[str], environ: Mapping[str, str], stop: StopSignals) -> int:
    """Run ``command`` and return its code; what ``stop`` catches reaches it once, as SIGTERM.

    torchrun passes SIGTERM on, and no SIGUSR1. A second SIGTERM would leave its ranks no time to
    save: the command has a session of its own, which a terminal's Ctrl-C does not reach. Where
    SLURM signals every process of a step, and may know them by their session, only a SIGUSR1 is
    passed on, which torchrun is told to ignore.
    """
    in_step = "SLURM_STEP_ID" in os.environ
    process = subprocess.Popen(
        ["bash", "-c", "trap '' USR1; exec \"$@\"", "bash", *command],
        env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "900"} | os.environ | environ,
        start_new_session=not in_step,
    )
    is_told = False
    while True:
        try:
            return process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            if stop.caught and not is_told:
                is_told = True
                if not in_step or stop.caught == signal.SIGUSR1:
                    process.terminate()


def load(save: str, name: str, arch: Arch, teacher: Arch) -> Candidate:
    """Return what a retrained candidate left in its folder."""
    metrics = read_metrics(Path(save) / name / "metrics.jsonl")
    iterations, losses = curve(metrics, LOSS)
    sizes = {size: getattr(arch, size) for size in sizes_of(arch)}
    return Candidate(
        name=name,
        sizes={k: v for k, v in sizes.items() if v not in (None, getattr(teacher, k))},
        parameters=num_parameters(arch),
        iterations=[int(iteration) for iteration in iterations],
        losses=losses,
        kl=curve(metrics, KL)[1],
    )


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Return Spearman's correlation of two lists: 1 in the same order, -1 in the opposite."""

    def ranks(values: Sequence[float]) -> list[float]:
        places = sorted(values)
        return [places.index(x) + (places.count(x) - 1) / 2 for x in values]

    a, b = ranks(left), ranks(right)
    mean = (len(a) - 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    spread = [sum((x - mean) ** 2 for x in values) for values in (a, b)]
    return covariance / (spread[0] * spread[1]) ** 0.5 if all(spread) else 0.0


def write(folder: Path, candidates: list[Candidate]) -> None:
    """Write ranking.md, .json and .png, and print the first."""
    ranked = sorted(candidates, key=lambda candidate: candidate.losses[-1])
    names = list(dict.fromkeys(size for c in ranked for size in c.sizes))
    header = ["candidate", *names, "parameters", "loss before", "loss after", "KL after"]
    before = sorted(c.losses[0] for c in ranked)
    rows = [
        [
            c.name,
            *(c.sizes.get(size) for size in names),
            c.parameters,
            f"{c.losses[0]:.3f} ({before.index(c.losses[0]) + 1}.)",
            f"{c.losses[-1]:.3f}",
            f"{c.kl[-1]:.3f}",
        ]
        for c in ranked
    ]
    last = [c.losses[-1] for c in ranked]
    agreement = [
        [str(iteration), rank_correlation([c.losses[number] for c in ranked], last)]
        for number, iteration in enumerate(ranked[0].iterations)
    ]
    text = "\n\n".join(
        [
            markdown_table(header, rows),
            "Validation loss and KL to the teacher in nats per token, before (with the place in "
            "that order) and after retraining; the best first.",
            markdown_table(["iteration", "rank correlation with the last"], agreement),
            "![losses](ranking.png)",
        ]
    )
    with written_aside(folder / "ranking.md") as aside:
        aside.write_text(text + "\n")
    with written_aside(folder / "ranking.json") as aside:
        aside.write_text(json.dumps([asdict(c) for c in ranked], indent=1) + "\n")
    figure, (axes,) = new_figure(1, 1)
    curves = {c.name: (c.iterations, c.losses) for c in ranked}
    plot_curves(axes, curves, title="candidates in retraining", x="iteration", y="validation loss")
    with written_aside(folder / "ranking.png") as aside:
        figure.savefig(aside, format="png", dpi=120)
    print(text)


if __name__ == "__main__":
    run_main(main)
