"""The candidates of a search space: its models within a budget.

The first step of the architecture search of arXiv:2407.14679, section 3: list every combination of
sizes, keep those within the budget. No search heuristics: the paper's spaces leave fewer than 20.
"""

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_ext.arch import Arch, num_parameters
from megatron_ext.arch.axes import DEPTH_SIZES, SIZES, sizes_of
from megatron_ext.pruning.budget import COSTS, Limit, Use, fits
from megatron_ext.pruning.targets import check_size, target_arch
from megatron_ext.runtime.errors import USAGE, UserError
from megatron_ext.runtime.texts import parse_yaml

Space = Mapping[str, Sequence[int | str]]
"""Names of ``SIZES`` and the values to try: numbers, of neurons also multiples of hidden_size as
``2.5x``."""


def read_space(path: str | os.PathLike, source: Arch) -> Space:
    """Return the search space of a YAML file.

        num_layers: [29, 30, 31, 32]
        ffn_hidden_size: [9216, 2.5x, 3x]     # 2.5 times the hidden_size of the candidate

    Raises:
        UserError: it cannot be read, or names a size or a value that cannot be pruned to.
    """
    try:
        space = parse_yaml(Path(path).read_text())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--search-space {path} cannot be read: {reason}.", USAGE) from error
    if not isinstance(space, dict) or not space:
        raise UserError(
            f"--search-space {path}: needs lines like 'hidden_size: [2560, 3072]'.", USAGE
        )
    for name, values in space.items():
        where = f"--search-space {path}: {name}"
        if name not in SIZES:
            raise UserError(f"{where}: choose from {', '.join(SIZES)}.", USAGE)
        if (
            not isinstance(values, list)
            or not values
            or not all(_is_value(name, v) for v in values)
        ):
            kinds = "whole numbers" + ", or multiples of hidden_size as 2.5x" * ("ffn" in name)
            raise UserError(f"{where}: {values!r}: needs a list of {kinds}.", USAGE)
        try:
            for value in values:
                check_size(source, name, value if isinstance(value, int) else 1)
        except UserError as error:
            raise UserError(f"{where}: {error}", USAGE) from error
    return space


def _is_value(name: str, value: Any) -> bool:
    if isinstance(value, str):
        return "ffn" in name and re.fullmatch(r"\d+(\.\d+)?x", value) is not None
    return type(value) is int


def auto_space(source: Arch) -> Space:
    """Return the space of ``--search-space auto``: depth and width, from all of it to a half.

    Layers and widths in eighths, experts in quarters; heads and query groups stay (section 3 of the
    paper: pruning them saves least), and so do widths in which layers differ. Widths are multiples
    of what the source's are, up to 64.
    """
    space = {}
    for name in sizes_of(source):
        number = getattr(source, name)
        differs = len(source.values(name)) > 1
        if name in ("num_attention_heads", "num_query_groups") or differs:
            continue
        multiple = 1 if name in (*DEPTH_SIZES, "num_experts") else math.gcd(number, 64)
        eighths = range(8, 3, -2 if name == "num_experts" else -1)
        values = [number * n // 8 // multiple * multiple for n in eighths]
        if name == "num_experts":
            values = [value for value in values if value >= source.moe_router_topk]
        space[name] = list(dict.fromkeys(value for value in values if value))
    return space


def candidates(source: Arch, space: Space, limits: Sequence[Limit], use: Use) -> dict[str, Arch]:
    """Return the pruned forms of ``source`` in ``space`` that fit the budget.

    Combinations that contradict themselves are passed over: heads that query groups do not divide,
    multiples of hidden_size that are no whole numbers or larger than in the source.

    Args:
        source: the model to prune.
        space: what ``read_space`` returns; sizes that it does not name stay.
        limits: none of them may be exceeded, and one must be reached (``budget.fits``).
        use: what costs depend on.

    Returns:
        Targets by name, ``L32-A24-F9216-H3072``, sizes in the order of the space and the last of
        them running fastest.

    Raises:
        UserError: none fits; the nearest costs are named.
    """
    everything = dict(_combinations(source, space))
    if not everything:
        raise UserError(
            "the search space has no valid model: heads must be a multiple of query groups and not "
            "more for each than in the source, multiples of hidden_size whole numbers and not more "
            "than in the source, experts at least what the router chooses.",
            USAGE,
        )
    found = {name: arch for name, arch in everything.items() if fits(arch, limits, use)}
    if not found:
        missed = "; ".join(_missed(limit, list(everything.values()), use) for limit in limits)
        raise UserError(
            f"none of {len(everything)} models of the search space fits: {missed}.", USAGE
        )
    return found


def _missed(limit: Limit, archs: Sequence[Arch], use: Use) -> str:
    """Return a band and the costs next to it."""
    costs = [COSTS[limit.cost](arch, use) for arch in archs]
    below = max((cost for cost in costs if cost < limit.low), default=None)
    above = min((cost for cost in costs if cost > limit.high), default=None)
    nearest = [f"{n:,} {side}" for n, side in ((below, "below"), (above, "above")) if n]
    band = f"{limit.low:,.0f} to {limit.high:,.0f} {limit.cost}"
    return f"{band}, the nearest: {', '.join(nearest)}" if nearest else band


def _combinations(source: Arch, space: Space) -> Iterator[tuple[str, Arch]]:
    for values in itertools.product(*space.values()):
        written = dict(zip(space, values, strict=True))
        hidden_size = int(written.get("hidden_size", source.hidden_size))
        exact = {
            name: Fraction(value.removesuffix("x")) * hidden_size
            if isinstance(value, str)
            else Fraction(value)
            for name, value in written.items()
        }
        if any(value.denominator > 1 for value in exact.values()):
            continue
        sizes = {name: int(value) for name, value in exact.items()}
        try:
            arch = target_arch(source, **sizes)
        except UserError:
            continue
        yield "-".join(f"{SIZES[name].letter}{value}" for name, value in sizes.items()), arch


def table(targets: Mapping[str, Arch]) -> str:
    """Return the sizes that differ and the parameter counts of ``targets``, a line each."""
    built = {name for arch in targets.values() for name in sizes_of(arch)}
    sizes = [
        name
        for name in SIZES
        if name in built and len({getattr(arch, name) for arch in targets.values()}) > 1
    ]
    rows = [["", *sizes, "parameters", "without embeddings"]]
    for name, arch in targets.items():
        counts = num_parameters(arch), num_parameters(arch, embeddings=False)
        rows.append([name, *(f"{n:,}" for n in (*(getattr(arch, s) for s in sizes), *counts))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def as_yaml(targets: Mapping[str, Arch], space: Space) -> str:
    """Return ``targets`` as the file of --targets, a line each with the sizes of ``space``."""
    lines = (
        f"{name}: {{{', '.join(f'{size}: {getattr(arch, size)}' for size in space)}}}"
        for name, arch in targets.items()
    )
    return "".join(f"{line}\n" for line in lines)
