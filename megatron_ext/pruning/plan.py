"""Plans: which units of a model are kept. Data only; a plan does not know how many ranks made it.

Indices are global, count from 0 and ascend. ``heads``, ``ffn``, ``experts`` and ``shared_ffn`` have
one tuple per kept layer, under the layer's number in the *source* model, as far as its layers have
such units; ``moe_ffn`` has one per kept (layer, expert).

``planner.py`` makes plans, ``kept.py`` knows how a unit spreads over the axes of tensors.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_ext.arch import Arch
from megatron_ext.axes import AXES, SIZES, axes_of
from megatron_ext.pruning.residual import MODES, NONE, Pairs, bad_pairs
from megatron_ext.pruning.scores import arch_from_json
from megatron_ext.runtime.errors import CHECKPOINT, UserError
from megatron_ext.runtime.files import written_aside

FORMAT = "minitron-plan-1"

# Axes with units of their own in each layer, and the size that says how many.
LAYER_AXES = {axis.name: axis.size.name for axis in AXES if axis.scope == "layer"}
# What two models of one shape may differ in and still share a plan.
NOT_SHAPE = ("attention_dropout", "hidden_dropout", "init_method_std")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is kept of ``source`` so that ``target`` is left."""

    source: Arch
    target: Arch
    layers: tuple[int, ...]
    """Kept layers, in the source's numbering."""
    hidden: tuple[int, ...]
    """Kept channels of the residual stream, one set for the whole model."""
    heads: Mapping[int, tuple[int, ...]]
    """Kept query heads of each kept layer, as many of each query group of which any is kept."""
    ffn: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Kept neurons of each kept layer; empty in a mixture of experts."""
    experts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Kept experts of each kept layer."""
    moe_ffn: Mapping[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    """Kept neurons of each kept (layer, expert)."""
    shared_ffn: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Kept neurons of the shared experts of each kept layer."""
    head_residual: str = NONE
    """How pruned heads are folded into kept ones, see ``pruning.residual``."""
    residual_pairs: Mapping[int, Pairs] = field(default_factory=dict)
    """(kept head, pruned head) of each kept layer; empty without ``head_residual``."""
    made: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: aggregation, calibration samples, ..."""

    def to_json(self) -> str:
        """Return the plan as JSON with one line per vector."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"source": asdict(self.source), "target": asdict(self.target)}
        lines = [f'"format": {json.dumps(FORMAT)}']
        for name, value in values.items():
            if isinstance(value, Mapping) and value:
                entries = [f"  {json.dumps(_name(k))}: {json.dumps(v)}" for k, v in value.items()]
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
            values = json.loads(text)
            if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            plan = cls(
                source=arch_from_json(values.pop("source")),
                target=arch_from_json(values.pop("target")),
                layers=_indices(values.pop("layers")),
                hidden=_indices(values.pop("hidden")),
                **{axis: _of_layers(values.pop(axis, {})) for axis in LAYER_AXES},
                moe_ffn={
                    _layer_and_expert(name): _indices(kept)
                    for name, kept in values.pop("moe_ffn", {}).items()
                },
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
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"the plan cannot be read: {error}.", CHECKPOINT) from error
        if problem := contradiction(plan):
            raise UserError(f"the plan contradicts itself: {problem}.", CHECKPOINT)
        return plan


def contradiction(plan: Plan) -> str | None:
    """Return what is wrong with a plan in itself, or None."""
    source, target = plan.source, plan.target
    for name, value in asdict(source).items():
        if name not in SIZES and getattr(target, name) != value:
            return f"{name} is {value} in the source and {getattr(target, name)} in the target"
    if problem := _bad_indices("layers", plan.layers, source.num_layers, target.num_layers):
        return problem
    if problem := _bad_indices("hidden", plan.hidden, source.hidden_size, target.hidden_size):
        return problem
    for axis in LAYER_AXES:
        has_axis, kept = axis in layer_axes(source), getattr(plan, axis)
        if tuple(sorted(kept)) != (plan.layers if has_axis else ()):
            return f"{axis} names layers {sorted(kept)}, kept are {list(plan.layers)}"
        for layer, indices in kept.items():
            sizes = (getattr(arch, LAYER_AXES[axis]) for arch in (source, target))
            if problem := _bad_indices(f"{axis}.{layer}", indices, *sizes):
                return problem
    expected = sorted((layer, expert) for layer in plan.experts for expert in plan.experts[layer])
    if sorted(plan.moe_ffn) != expected:
        return "moe_ffn does not name the kept experts of each layer"
    for (layer, expert), indices in plan.moe_ffn.items():
        sizes = source.moe_ffn_hidden_size, target.moe_ffn_hidden_size
        if problem := _bad_indices(f"moe_ffn.{layer}.{expert}", indices, *sizes):
            return problem
    per_group = source.num_attention_heads // source.num_query_groups
    for layer, indices in plan.heads.items():
        counts = Counter(head // per_group for head in indices)
        if len(counts) != target.num_query_groups or len(set(counts.values())) != 1:
            in_groups = [counts[group] for group in range(max(counts) + 1)]
            return (
                f"heads.{layer} keeps {in_groups} heads of its query groups, the target "
                f"has {target.num_query_groups} groups"
            )
    return _bad_residual(plan)


def layer_axes(arch: Arch) -> dict[str, int]:
    """Return the axes of ``LAYER_AXES`` that the layers of ``arch`` have, with their lengths."""
    return {axis.name: axis.length(arch) for axis in axes_of(arch) if axis.scope == "layer"}


def _bad_residual(plan: Plan) -> str | None:
    if plan.head_residual not in MODES:
        return f"head_residual is {plan.head_residual!r}, not one of {', '.join(MODES)}"
    expected = () if plan.head_residual == NONE else plan.layers
    if tuple(sorted(plan.residual_pairs)) != expected:
        return f"residual_pairs names layers {sorted(plan.residual_pairs)}, not {list(expected)}"
    for layer, pairs in plan.residual_pairs.items():
        if problem := bad_pairs(pairs, plan.heads[layer], plan.source):
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


def _of_layers(values: Mapping[str, Any]) -> dict[int, tuple[int, ...]]:
    return {int(layer): _indices(kept) for layer, kept in values.items()}


def _name(key: Any) -> str:
    """Return the JSON name of a layer, ``3``, or of a layer's expert, ``3.7``."""
    return ".".join(map(str, key)) if isinstance(key, tuple) else str(key)


def _layer_and_expert(name: str) -> tuple[int, int]:
    layer, expert = name.split(".")
    return int(layer), int(expert)


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
