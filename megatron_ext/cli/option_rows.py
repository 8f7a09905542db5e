"""Options that are no fields: what makes them change nothing, and what is said of them.

A row is a reason and the options it holds for, each as one types it:

    --name          a switch
    --name=         takes a value
    --name=1|[1]    takes a value; these ask for nothing, the first is Megatron-LM's default
    --name=...      takes several values
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_ext.runtime.errors import USAGE, UserError, warn

Rows = Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Option:
    """An option that is accepted without effect, or refused."""

    nargs: int | str | None
    """As argparse's: 0 for a switch, None for one value, "*" for several."""
    neutral: tuple[str, ...]
    """Values that ask for nothing: they are accepted without a word."""
    reason: str
    """Why it has no effect; or why it is refused, and what to do instead."""
    refused: bool = False


def options(rows: Rows, *, refused: bool = False) -> dict[str, Option]:
    """Return the options of ``rows`` by name."""
    return {
        name: Option(nargs, neutral, reason, refused)
        for reason, words in rows
        for name, nargs, neutral in map(_option, words.split())
    }


def judge(typed: Sequence[tuple[str, Sequence[str]]], known: Mapping[str, Option]) -> None:
    """Warn on rank 0, in one line, of what was typed without effect; refuse the rest.

    Args:
        typed: option and its values, in order.
        known: what is known of every option in ``typed``.

    Raises:
        UserError: with code ``USAGE`` and one line for each option that is refused.
    """
    asking = [(name, values) for name, values in typed if not is_neutral(values, known[name])]
    refused = [
        f"{' '.join([name, *values])}: {known[name].reason}."
        for name, values in asking
        if known[name].refused
    ]
    if len(refused) > 1:
        refused.insert(0, f"{len(refused)} flags are refused:")
    if refused:
        raise UserError("\n  ".join(refused), USAGE)
    by_reason: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for name, _ in asking):
        by_reason.setdefault(known[name].reason, []).append(name)
    if by_reason:
        parts = [f"{' '.join(names)} ({reason})" for reason, names in by_reason.items()]
        warn(f"flags without effect: {', '.join(parts)}.")


def is_neutral(values: Sequence[str], option: Option) -> bool:
    """Whether ``values`` were typed and ask for nothing."""
    return len(values) == 1 and any(_same(values[0], neutral) for neutral in option.neutral)


def _option(word: str) -> tuple[str, int | str | None, tuple[str, ...]]:
    name, equals, values = word.partition("=")
    if values == "...":
        return name, "*", ()
    return name, None if equals else 0, tuple(filter(None, values.split("|")))


def _same(value: str, neutral: str) -> bool:
    """Whether two values are equal: as numbers, or as text. ``[1]*N`` is of any length."""
    try:
        return float(value) == float(neutral)
    except ValueError:
        return re.sub(r"\*\d+$", "*N", value.replace(" ", "").strip("()")) == neutral
