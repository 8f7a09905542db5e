"""Plans: which units of a model are kept. Data only; a plan does not know how many ranks made it.

Kept units go by the names of the scores, ``layers``, ``hidden``, ``ffn.3``, ``moe_ffn.3.7``, with
the numbers of layers and experts in the *source* model. Indices are global, count from 0 and
ascend. The file has them by axis, then by layer, or layer and expert.

Depth is kept as ``layers``, or as ``attention`` and ``mlp`` where sub-layers go alone; a number in
``ffn.3`` is then that of the MLP among the source's MLPs, in ``heads.3`` of the attention.

``planner.py`` makes plans, ``kept.py`` knows how a unit spreads over the axes of tensors.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.arch import Arch, per_layer
from megatron_ext.arch.axes import AXES, SIZES, axes_of, has_sublayers
from megatron_ext.arch.kinds import KINDS
from megatron_ext.arch.pattern import kept_of
from megatron_ext.arch.rows import Axis, kept_layers, layer_of
from megatron_ext.pruning.residual import MODES, NONE, Pairs, bad_pairs
from megatron_ext.pruning.scores import arch_from_json
from megatron_ext.runtime.errors import CHECKPOINT, UserError
from megatron_ext.runtime.files import written_aside
from megatron_ext.runtime.texts import parse_json

FORMAT = "minitron-plan-1"

# Kinds that a file names only where a model has them: older readers know no such entry.
NEWER = ("mamba",)

# What two models of one shape may differ in and still share a plan.
NOT_SHAPE = ("attention_dropout", "hidden_dropout", "init_method_std")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Units of ``source`` that are kept so that ``target`` is left."""

    source: Arch
    target: Arch
    kept: Mapping[str, tuple[int, ...]]
    """Name -> kept units: of the model, of each kept layer, of each kept expert of a kept layer."""
    head_residual: str = NONE
    """Way of folding pruned heads into kept ones, see ``pruning.residual``."""
    residual_pairs: Mapping[int, Pairs] = field(default_factory=dict)
    """(kept head, pruned head) of each kept layer; empty without ``head_residual``."""
    made: Mapping[str, Any] = field(default_factory=dict)
    """Record of how it was made: aggregation, calibration samples, ..."""

    @property
    def axes(self) -> list[Axis]:
        """The axes that this plan cuts: those of whole layers, or of sub-layers."""
        return axes_of(_view(self.source, by_sublayers="layers" not in self.kept))

    def to_json(self) -> str:
        """Return the plan as JSON with one line per vector."""
        values: dict[str, Any] = {"source": asdict(self.source), "target": asdict(self.target)}
        values |= _by_axis(self.kept)
        names = ("head_residual", "residual_pairs", "made")
        values |= {name: getattr(self, name) for name in names}
        lines = [f'"format": {json.dumps(FORMAT)}']
        for name, value in values.items():
            if isinstance(value, Mapping) and value:
                entries = [f"  {json.dumps(str(k))}: {json.dumps(v)}" for k, v in value.items()]
                lines.append(f'"{name}": {{\n' + ",\n".join(entries) + "\n }")
            else:
                lines.append(f'"{name}": {json.dumps(value)}')
        return "{\n " + ",\n ".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Return the plan that ``to_json`` wrote.

        Raises:
            UserError: the text is not a plan, or the plan contradicts itself.
        """
        try:
            values = parse_json(text)
            if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            source = arch_from_json(values.pop("source"))
            plan = cls(
                source=source,
                target=arch_from_json(values.pop("target")),
                kept=_kept(values, source),
                head_residual=values.pop("head_residual", NONE),
                residual_pairs={
                    int(layer): tuple(_pair(pair) for pair in pairs)
                    for layer, pairs in values.pop("residual_pairs", {}).items()
                },
                made=dict(values.pop("made")),
            )
            if values:
                raise ValueError(f"unknown entry {next(iter(values))!r}")
        except KeyError as error:
            raise UserError(f"the plan has no entry {error}.", CHECKPOINT) from error
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"the plan cannot be read: {error}.", CHECKPOINT) from error
        if problem := contradiction(plan):
            raise UserError(f"the plan contradicts itself: {problem}.", CHECKPOINT)
        return plan


def contradiction(plan: Plan) -> str | None:
    """Return what is wrong with a plan in itself, or None."""
    source, target = plan.source, plan.target
    for name, value in asdict(source).items():
        others = ("hybrid_layer_pattern", "by_layer", *per_layer.NAMES)
        cut = name in SIZES or name in others
        if not cut and getattr(target, name) != value:
            return f"{name} is {value} in the source and {getattr(target, name)} in the target"
    for axis in AXES:
        if problem := _bad_axis(plan, axis):
            return problem
    left = kept_of(source.pattern, {kind: kept_layers(plan.kept, kind) for kind in source.kinds})
    if target.pattern != left:
        return f"the sub-layers that it keeps are {left}, the target's {target.pattern}"
    for name, value in per_layer.of_layers(source, plan.kept.get("layers", ())).items():
        if getattr(target, name) != value:
            return f"{name} of the layers that it keeps is {value}, not {getattr(target, name)}"
    return _bad_residual(plan)


def sizes_of_layer(
    axis: Axis, name: str, kept: Mapping[str, tuple[int, ...]], source: Arch, target: Arch
) -> tuple[Arch, Arch]:
    """Return source and target with the sizes of the layer that has a vector of ``axis``.

    ``kept`` says which layers of the source are left.
    """
    layer = layer_of(name)
    if layer is None:
        return source, target
    new_layer = kept_layers(kept, axis.kind).index(layer)
    return source.at(axis.kind, layer), target.at(axis.kind, new_layer)


def _view(source: Arch, *, by_sublayers: bool) -> Arch:
    """Return the source, as a model of sub-layers if these are cut."""
    return source.by_sublayers() if by_sublayers and has_sublayers(source) else source


def _bad_axis(plan: Plan, axis: Axis) -> str | None:
    kept = {name: units for name, units in plan.kept.items() if name.split(".")[0] == axis.name}
    # Layers and experts are rows before the others, and were checked.
    expected = list(axis.vectors(plan.kept)) if axis in plan.axes else []
    if kept.keys() != set(expected):
        places = (" ".join(name.partition(".")[2] for name in names) for names in (kept, expected))
        return f"{axis.name} names {axis.scope}s {next(places)}, kept are {next(places)}"
    for name in expected:
        sizes = sizes_of_layer(axis, name, plan.kept, plan.source, plan.target)
        problem = _bad_indices(name, kept[name], *map(axis.length, sizes))
        if problem := problem or _bad_groups(axis, name, kept[name], *sizes):
            return problem
    return None


def _bad_groups(
    axis: Axis, name: str, kept: tuple[int, ...], source: Arch, target: Arch
) -> str | None:
    """Return what is wrong with a vector of an axis whose units come in groups, or None."""
    if axis.within is None:
        return None
    groups, left = (getattr(arch, axis.within.name) for arch in (source, target))
    counts = Counter(unit * groups // axis.length(source) for unit in kept)
    if len(counts) == left and len(set(counts.values())) == 1:
        return None
    in_groups = [0] * groups
    for group, count in counts.items():
        in_groups[group] = count
    return f"{name} keeps {in_groups} units of its {axis.within.noun}, the target has {left} groups"


def _bad_residual(plan: Plan) -> str | None:
    if plan.head_residual not in MODES:
        return f"head_residual is {plan.head_residual!r}, not one of {', '.join(MODES)}"
    expected = () if plan.head_residual == NONE else kept_layers(plan.kept, "attention")
    if tuple(sorted(plan.residual_pairs)) != expected:
        return f"residual_pairs names layers {sorted(plan.residual_pairs)}, not {list(expected)}"
    for layer, pairs in plan.residual_pairs.items():
        source = plan.source.at("attention", layer)
        if problem := bad_pairs(pairs, plan.kept[f"heads.{layer}"], source):
            return f"residual_pairs.{layer}: {problem}"
    return None


def _bad_indices(name: str, indices: tuple[int, ...], length: int, count: int) -> str | None:
    if len(indices) != count:
        return f"{name} keeps {len(indices)} units, the target has {count}"
    if any(b <= a for a, b in itertools.pairwise(indices)):
        return f"{name} does not ascend or repeats a unit"
    if indices[0] < 0 or indices[-1] >= length:
        return f"{name} names unit {indices[0] if indices[0] < 0 else indices[-1]} of {length}"
    return None


def _indices(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise TypeError("kept units must be a list of integers")
    return tuple(values)


def _by_axis(kept: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return kept units as the file has them: {"hidden": [...], "ffn": {"3": [...]}}."""
    named = {name.split(".")[0] for name in kept}
    values: dict[str, Any] = {
        axis.name: {}
        for axis in AXES
        if axis.name in named or (axis.scope != "model" and axis.kind not in NEWER)
    }
    for name, units in kept.items():
        axis, _, place = name.partition(".")
        if place:
            values[axis][place] = units
        else:
            values[axis] = units
    return values


def _kept(values: dict[str, Any], source: Arch) -> dict[str, tuple[int, ...]]:
    """Take what ``_by_axis`` returned out of ``values``. An axis that older files lack is kept."""
    kept: dict[str, tuple[int, ...]] = {}
    there = axes_of(_view(source, by_sublayers=any(kind in values for kind in KINDS)))
    for axis in AXES:
        if axis.scope == "model":
            if axis in there:
                kept[axis.name] = _indices(values.pop(axis.name))
        elif axis.name in values:
            for place, units in values.pop(axis.name).items():
                kept[f"{axis.name}.{place}"] = _indices(units)
        elif axis in there:
            names = list(axis.vectors(kept))
            kept |= {name: tuple(range(axis.length(source, layer_of(name)))) for name in names}
    return kept


def _pair(values: Any) -> tuple[int, int]:
    kept, pruned = _indices(values)
    return kept, pruned


def save_plan(path: str | os.PathLike, plan: Plan) -> None:
    """Write ``plan`` to ``path``, aside first and then renamed. Call it on one rank."""
    with written_aside(path) as aside:
        aside.write_text(plan.to_json())


def load_plan(path: str | os.PathLike) -> Plan:
    """Read a plan. Every rank may call it; no collectives.

    Raises:
        UserError: the file cannot be read, is no plan, or contradicts itself.
    """
    try:
        return Plan.from_json(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--plan {path} cannot be read: {error}.", CHECKPOINT) from error
    except UserError as error:
        raise UserError(f"--plan {path}: {error}", CHECKPOINT) from error


def check_plan(plan: Plan, arch: Arch) -> None:
    """Raise ``UserError`` unless ``plan`` was made for a model like ``arch``."""
    for name, value in asdict(arch).items():
        planned = getattr(plan.source, name)
        if name not in NOT_SHAPE and planned != value:
            raise UserError(
                f"the plan was made for another model: {name} {planned}, this one has {value}; "
                "remove the --plan file to plan again.",
                CHECKPOINT,
            )
