"""Pruning in several steps, scored in between, as one plan.

T iterations from size d_s to d_t: iteration i scores a model of d_s - i (d_s - d_t) / T units and
prunes it to d_s - (i + 1) (d_s - d_t) / T (arXiv:2407.14679, section 2.2), on every width axis.
Layers are not pruned in steps: they are scored on the source and go in the last iteration, so that
every model in between fits the pipeline of the source.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_ext.arch import Arch
from megatron_ext.arch.axes import AXES, DEPTH_SIZES, axes_of, sizes_of
from megatron_ext.arch.kinds import KINDS
from megatron_ext.arch.rows import kept_layers
from megatron_ext.pruning.plan import Plan

# Sizes in between are multiples of this, as far as source and target are: 2, 4, ... or 64
# tensor-parallel ranks that fit both fit them too, and no plan depends on the layout.
MULTIPLE = 64
KIND_OF = {axis.name: axis.kind for axis in AXES}


def iteration_targets(source: Arch, target: Arch, iterations: int) -> list[Arch]:
    """Return what each iteration prunes to; the last is ``target``.

    Sizes are rounded up to a multiple of gcd(source, target, 64), heads to the same number per
    query group. Iterations that rounding leaves without work are left out.
    """
    width = [name for name in sizes_of(source) if name not in DEPTH_SIZES]
    targets = []
    for step in range(1, iterations):
        sizes: dict[str, Any] = {
            name: _between(getattr(source, name), getattr(target, name), step, iterations)
            for name in width
            if getattr(source, name) != getattr(target, name)
        }
        for axis in axes_of(source):
            if axis.within is not None and axis.size.name in sizes:
                names = axis.size.name, axis.within.name
                sizes |= _in_groups(source, target, names, sizes, step, iterations)
        targets.append(replace(source, **sizes))
    distinct = dict.fromkeys([*targets, target])
    distinct.pop(source, None)
    return list(distinct) or [target]


def _in_groups(
    source: Arch,
    target: Arch,
    names: tuple[str, str],
    sizes: Mapping[str, int],
    step: int,
    iterations: int,
) -> dict[str, int]:
    """Return how many units in groups are left, the same number of each group.

    ``names`` are the sizes that count the units and their groups.
    """
    units, within = names
    groups = getattr(source, within)
    if getattr(target, within) == groups:
        return {units: -(-sizes[units] // groups) * groups}
    if groups == getattr(source, units):
        return {}
    # Whole groups go too: what is left of each must shrink from step to step as well.
    before, after = (getattr(arch, units) // getattr(arch, within) for arch in (source, target))
    return {units: _between(before, after, step, iterations) * sizes[within]}


def _between(source: int, target: int, step: int, iterations: int) -> int:
    multiple = math.gcd(source, target, MULTIPLE)
    exact = source * iterations - step * (source - target)  # times iterations
    return -(-exact // (iterations * multiple)) * multiple


def compose(first: Plan, second: Plan) -> Plan:
    """Return the plan that prunes at once what ``first`` and then ``second`` prune.

    Indices count in the source of ``first``. Neither may fold heads: a head would be changed twice.
    """
    assert first.target == second.source, "the second plan is for another model"
    assert not first.residual_pairs, "heads were folded already"
    assert not second.residual_pairs, "heads would be folded after others were pruned"

    def through(indices: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
        return tuple(kept[index] for index in indices)

    def before(name: str) -> str:
        """Return the name in the source of ``first`` of a vector of the model in between."""
        axis, *numbers = name.split(".")
        if not numbers:
            return axis
        layer, *experts = map(int, numbers)
        layer = kept_layers(first.kept, KIND_OF[axis])[layer]
        experts = [first.kept[f"experts.{layer}"][expert] for expert in experts]
        return ".".join(map(str, (axis, layer, *experts)))

    origins = {name: before(name) for name in second.kept}
    iterations = first.made.get("iterations", 1) + second.made.get("iterations", 1)
    return Plan(
        source=first.source,
        target=second.target,
        kept={
            origin: through(
                second.kept[name],
                kept_layers(first.kept, origin) if origin in KINDS else first.kept[origin],
            )
            for name, origin in origins.items()
        },
        made={**first.made, **second.made, "iterations": iterations},
    )
