"""Plans: which units of a model are kept. Data only; a plan does not know how many ranks made it.

Indices are global, count from 0 and ascend. ``ffn`` and ``heads`` have one tuple per kept layer,
under the layer's number in the *source* model.

``kept.py`` knows how a unit spreads over the axes of tensors.
"""

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.arch import Arch
from megatron_ext.errors import CHECKPOINT, USAGE, UserError
from megatron_ext.pruning.residual import MODES, NONE, Pairs, bad_pairs, mirrored_pairs
from megatron_ext.pruning.scores import Scores, arch_from_json, written_aside

FORMAT = "minitron-plan-1"

# What pruning may change; everything else of source and target is the same.
PRUNABLE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
)
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
    ffn: Mapping[int, tuple[int, ...]]
    """Kept neurons of each kept layer."""
    heads: Mapping[int, tuple[int, ...]]
    """Kept query heads of each kept layer, as many of each query group."""
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
            if isinstance(value, Mapping):
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
            values = json.loads(text)
            if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            plan = cls(
                source=arch_from_json(values.pop("source")),
                target=arch_from_json(values.pop("target")),
                layers=_indices(values.pop("layers")),
                hidden=_indices(values.pop("hidden")),
                ffn={int(layer): _indices(kept) for layer, kept in values.pop("ffn").items()},
                heads={int(layer): _indices(kept) for layer, kept in values.pop("heads").items()},
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


def target_arch(source: Arch, **sizes: int | None) -> Arch:
    """Return ``source`` with some sizes replaced; None keeps one.

    Where each query head has its own key and value (no query groups), these go with the head.

    Raises:
        UserError: a size that cannot be pruned to.
    """
    changed = {name: size for name, size in sizes.items() if size is not None}
    for name, size in changed.items():
        if not 1 <= size <= getattr(source, name):
            raise UserError(
                f"--target-{name.replace('_', '-')} {size}: choose from 1 to the source's "
                f"{getattr(source, name)}.",
                USAGE,
            )
    if source.num_query_groups == source.num_attention_heads and "num_attention_heads" in changed:
        changed["num_query_groups"] = changed["num_attention_heads"]
    heads = changed.get("num_attention_heads", source.num_attention_heads)
    groups = changed.get("num_query_groups", source.num_query_groups)
    if heads % groups:
        raise UserError(
            f"--target-num-attention-heads {heads} is not a multiple of the {groups} query groups: "
            "each group keeps the same number of heads.",
            USAGE,
        )
    return replace(source, **changed)


def make_plan(
    scores: Scores | None, source: Arch, target: Arch, *, head_residual: str = NONE
) -> Plan:
    """Keep the units with the highest scores; among equal scores, those with the lower index.

    Neurons and heads are ranked within their layer, heads also within their query group, layers
    among each other. An axis whose size does not change keeps everything and needs no scores.
    Scores with a removal order (blocks of layers, or one layer at a time) remove layers by it.

    Args:
        scores: checked scores of ``source``; None if nothing has to be ranked.
        source: the model that is pruned.
        target: the model that is left, see ``target_arch``.
        head_residual: one of ``residual.MODES``. Without effect if all heads are kept.

    Raises:
        UserError: scores that are needed are missing, or ``target`` is no pruned ``source``; more
            than half of the heads would have to be folded.
    """
    vectors = {} if scores is None else scores.vectors

    def keep(name: str, length: int, count: int) -> tuple[int, ...]:
        if count == length:
            return tuple(range(length))
        return highest(_needed(vectors, name), count)

    # Without query groups all heads of a layer compete; their keys and values go with them.
    groups = 1 if target.num_query_groups != source.num_query_groups else source.num_query_groups
    per_group = source.num_attention_heads // groups

    def rank_heads(layer: int) -> list[list[int]]:
        """Return the heads that compete with each other, the highest scores first."""
        rows = _needed(vectors, f"heads.{layer}").view(groups, per_group)
        first = per_group * torch.arange(groups).unsqueeze(1)
        return (_descending(rows) + first).tolist()

    def keep_heads(layer: int) -> tuple[int, ...]:
        if target.num_attention_heads == source.num_attention_heads:
            return tuple(range(source.num_attention_heads))
        kept = [ranking[: target.num_attention_heads // groups] for ranking in rank_heads(layer)]
        return tuple(sorted(itertools.chain(*kept)))

    def pair_heads(layer: int) -> Pairs:
        count = target.num_attention_heads // groups
        pairs = [mirrored_pairs(ranking, count) for ranking in rank_heads(layer)]
        return tuple(sorted(itertools.chain(*pairs)))

    if scores is not None and scores.removal_order and target.num_layers < source.num_layers:
        layers = _not_removed(scores, source, target)
    else:
        layers = keep("layers", source.num_layers, target.num_layers)
    folds = head_residual != NONE and target.num_attention_heads < source.num_attention_heads
    sizes = source.ffn_hidden_size, target.ffn_hidden_size
    plan = Plan(
        source=source,
        target=target,
        layers=layers,
        hidden=keep("hidden", source.hidden_size, target.hidden_size),
        ffn={layer: keep(f"ffn.{layer}", *sizes) for layer in layers},
        heads={layer: keep_heads(layer) for layer in layers},
        head_residual=head_residual if folds else NONE,
        residual_pairs={layer: pair_heads(layer) for layer in layers} if folds else {},
        made={} if scores is None else _made(scores, cuts_layers=len(layers) < source.num_layers),
    )
    if problem := contradiction(plan):
        raise UserError(f"the target is no pruned source: {problem}.", USAGE)
    return plan


def highest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the indices of the ``count`` highest of [n] scores, ascending; ties to the lower."""
    return tuple(_descending(scores)[:count].sort().values.tolist())


def lowest(scores: Tensor) -> int:
    """Return the index of the lowest of [n] scores; of equal ones the last, so the first stay."""
    return int(_descending(scores)[-1])


def _descending(scores: Tensor) -> Tensor:
    return torch.sort(scores, descending=True, stable=True).indices


def _not_removed(scores: Scores, source: Arch, target: Arch) -> tuple[int, ...]:
    """Return the layers that are left when the first removals leave as many as the target has."""
    left = list(range(source.num_layers))
    for removed in scores.removal_order:
        if len(left) > target.num_layers:
            left = [layer for layer in left if layer not in removed]
    if len(left) != target.num_layers:
        sizes = [len(removed) for removed in scores.removal_order]
        raise UserError(
            f"--target-num-layers {target.num_layers} of {source.num_layers}: the scores "
            f"({scores.depth}) remove {sizes} layers, one after the other; choose "
            "--target-num-layers to fit, or remove the --scores file to score again.",
            USAGE,
        )
    return tuple(left)


def _made(scores: Scores, *, cuts_layers: bool) -> dict[str, Any]:
    made = {
        "aggregation": scores.aggregation,
        "samples": scores.samples,
        "seq_length": scores.seq_length,
    }
    if cuts_layers:
        made["depth"] = scores.depth
    if cuts_layers and scores.removal_order:
        made["removal_order"] = [list(layers) for layers in scores.removal_order]
    return made


def _needed(vectors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in vectors:
        raise UserError(f"this plan needs scores {name!r}: the scores have none.", CHECKPOINT)
    return vectors[name]


def contradiction(plan: Plan) -> str | None:
    """Return what is wrong with a plan in itself, or None."""
    source, target = plan.source, plan.target
    for name, value in asdict(source).items():
        if name not in PRUNABLE and getattr(target, name) != value:
            return f"{name} is {value} in the source and {getattr(target, name)} in the target"
    no_groups = source.num_query_groups == source.num_attention_heads
    if target.num_query_groups != source.num_query_groups and not (
        no_groups and target.num_query_groups == target.num_attention_heads
    ):
        return f"{source.num_query_groups} query groups would become {target.num_query_groups}"
    if problem := _bad_indices("layers", plan.layers, source.num_layers, target.num_layers):
        return problem
    if problem := _bad_indices("hidden", plan.hidden, source.hidden_size, target.hidden_size):
        return problem
    for axis, size in (("ffn", "ffn_hidden_size"), ("heads", "num_attention_heads")):
        kept = getattr(plan, axis)
        if tuple(sorted(kept)) != plan.layers:
            return f"{axis} names layers {sorted(kept)}, kept are {list(plan.layers)}"
        for layer, indices in kept.items():
            sizes = getattr(source, size), getattr(target, size)
            if problem := _bad_indices(f"{axis}.{layer}", indices, *sizes):
                return problem
    if target.num_query_groups == source.num_query_groups:
        per_group = source.num_attention_heads // source.num_query_groups
        for layer, indices in plan.heads.items():
            groups = torch.bincount(torch.tensor(indices) // per_group)
            if len(groups) != source.num_query_groups or groups.unique().numel() != 1:
                return f"heads.{layer} keeps {groups.tolist()} heads of its query groups"
    return _bad_residual(plan)


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
