"""CUDA graphs: runs of ``pretrain_distill.py`` captured and eager, of a pair bound by launches."""

import re
import statistics
import tempfile
from pathlib import Path

from tools.gpu.programs import COMMANDS, DISTIL, ENGINE, RUN, output_of
from tools.gpu.setup import Checks, Found, Setup, UnavailableError, need_engine

STEP = "--cuda-graph-impl local --cuda-graph-scope full_iteration"
HIDDEN = "--kd-hidden-states 1:1,embedding,mlp:2:2"
# name -> (what is captured, what both runs do besides)
CASES = {
    "whole steps": (STEP, ""),
    "whole steps, hidden states": (STEP, HIDDEN),
    "whole steps, fused output": (STEP, "--kd-fused-output"),
    "layers": ("--cuda-graph-impl local", ""),
    "layers, Transformer Engine": ("--cuda-graph-impl transformer_engine", ENGINE),
}
MOST_APART = 0.01
"""Share of the eager loss: the same kernels, but for sums whose order varies from run to run."""
LOSS, TIME = r"kd loss: (\S+)", r"elapsed time per iteration \(ms\): (\S+)"


def graph_checks(setup: Setup) -> Checks:
    """Distil 16 steps, eagerly and captured after 3, with evaluations before and after."""
    with tempfile.TemporaryDirectory() as folder:
        for name, (captured, both) in CASES.items():
            yield name, lambda captured=captured, both=both: compare(setup, captured, both, folder)


def compare(setup: Setup, captured: str, both: str, folder: str) -> Found:
    """Run the pair eagerly and captured; the first call makes its teacher and its student."""
    if "transformer_engine" in captured:
        need_engine(setup)
    if setup.place.device.type != "cuda":
        raise UnavailableError("no GPU")
    if not (Path(folder) / "pruned").exists():
        for name in ("train", "prune"):
            run(setup, COMMANDS[name][0], folder)
    command = DISTIL.replace("--train-iters 3", "--train-iters 16 --eval-interval 8")
    command = command.replace("--eval-iters 0", "--eval-iters 4")
    return side_by_side(*(run(setup, f"{command} {both} {how}", folder) for how in ("", captured)))


def side_by_side(eager: str, graph: str) -> Found:
    """Return what the outputs of an eager and a captured run say: losses, and time of a step."""
    losses = [[float(x) for x in re.findall(LOSS, text)] for text in (eager, graph)]
    gap = max(abs(b / a - 1) for a, b in zip(*losses, strict=True))
    before, after = (last_steps(text) for text in (eager, graph))
    times = f"{before:.1f} ms, {after:.1f} captured"
    return Found(
        f"{len(losses[0])} losses, at most {gap:.1e} apart; {times}",
        f"{MOST_APART:.0%}",
        gap <= MOST_APART,
    )


def run(setup: Setup, command: str, folder: str) -> str:
    """Return the output of a program."""
    script, *argv = f"{command} {RUN}".split()
    return output_of([script, *argv, "--device", setup.place.device.type], folder)


def last_steps(text: str) -> float:
    """Return the median milliseconds of the last steps, all of them after the capture."""
    return statistics.median(float(x) for x in re.findall(TIME, text)[-6:])
