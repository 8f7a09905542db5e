"""The comparison: each small layout against one rank, and what is printed of it."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_ext.certify import compare, ranks
from megatron_ext.certify.command import PRELOAD
from megatron_ext.certify.compare import Difference
from megatron_ext.certify.trials import Trial, Trials
from megatron_ext.runtime.errors import DIFFERS, UserError
from megatron_ext.runtime.local_ranks import RankError, run_ranks

TOLERANCE = 1e-6
"""Relative. Rounding is 1e-16 a number; what megatron-core rounds to float32, the router's softmax,
is 1e-7."""
TIMEOUT = 120


def certify(trials: Trials, check: Callable[[Trial, list, Any], list[str]], compute: Any) -> int:
    """Run the reference and every layout, and print each; returns the exit code.

    Args:
        trials: what to run.
        check: ``check_training`` or ``check_pruning``.
        compute: what a rank does, of ``ranks``.

    Raises:
        UserError: a rank failed.
    """
    began = time.perf_counter()
    (reference,) = on_ranks(trials.reference, compute)
    num_wrong = 0
    for trial in trials.layouts:
        problems = check(trial, on_ranks(trial, compute), reference)
        for problem in problems:
            print(f"  DIFFERS: {problem}", flush=True)
        num_wrong += bool(problems)
    count = f"{num_wrong} of {len(trials.layouts)} layouts differ from one rank"
    print(f"{count if num_wrong else 'RIGHT'} ({time.perf_counter() - began:.0f} s)")
    return DIFFERS if num_wrong else 0


def on_ranks(trial: Trial, compute: Callable) -> list[Any]:
    """Return what ``compute(trial)`` gives on every rank of ``trial``."""
    try:
        return run_ranks(trial.ranks.total, compute, trial, preload=PRELOAD, timeout=TIMEOUT)
    except RankError as error:
        reason = error.cause or str(error)
        raise UserError(f"{trial.name}: {reason}") from error


def check_training(trial: Trial, found: list[dict], reference: dict) -> list[str]:
    """Print the errors of a step; return what is beyond rounding."""
    figures = compare.of_figures([each["figures"] for each in found], reference["figures"])
    states = compare.of_states(found[0]["states"], reference["states"])
    gradients = compare.of_gradients(
        [each["gradients"] for each in found], reference["gradients"], trial.arch
    )
    print(f"{trial.name}: largest relative errors")
    for figure in figures:
        _print_row(figure.name, figure)
    _print_row("hidden states", compare.worst(states), named=True)
    _print_row(f"gradients of {len(gradients)} weights", compare.worst(gradients), named=True)
    problems = [f"{each.name} {each.error:.1e}" for each in figures if each.error > TOLERANCE]
    return [
        *problems,
        *_first_of("in the forward pass", states),
        *_first_of("in the backward pass", gradients),
    ]


def check_pruning(trial: Trial, found: list[dict], reference: dict) -> list[str]:
    """Print the errors of scores and whether plans are equal; return what is beyond rounding."""
    scores = compare.of_scores([each["scores"] for each in found], reference["scores"])
    other = [
        number
        for number, plan in enumerate(reference["plans"], 1)
        if any(each["plans"][number - 1] != plan for each in found)
    ]
    print(f"{trial.name}: largest relative errors")
    _print_row(f"scores, {len(scores)} vectors", compare.worst(scores), named=True)
    plans = f"{len(reference['plans']) - len(other)} of {len(reference['plans'])} equal"
    print(f"  {'plans':<28}{plans}", flush=True)
    return [
        *_first_of("scores", scores),
        *(f"the plan of target {number}" for number in other),
    ]


def _print_row(name: str, largest: Difference, *, named: bool = False) -> None:
    where = f"  {largest.name}" if named and largest.error else ""
    print(f"  {name:<28}{largest.error:.1e}{where}", flush=True)


def _first_of(where: str, differences: Sequence[Difference]) -> list[str]:
    first = compare.first(differences, TOLERANCE)
    if first is None:
        return []
    count = sum(each.error > TOLERANCE for each in differences)
    return [f"{where} first {first.name}, {first.error:.1e}; {count} of {len(differences)} in all"]


def training(trials: Trials) -> int:
    """Certify a training run; returns the exit code."""
    return certify(trials, check_training, ranks.gradients)


def pruning(trials: Trials) -> int:
    """Certify scores and plans; returns the exit code."""
    return certify(trials, check_pruning, ranks.scores)
