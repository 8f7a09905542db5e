"""From scores to a plan: which units have the highest scores.

Neurons, experts and heads are ranked within their layer, heads also within their query group,
neurons of an expert within that expert, layers among each other, sub-layers among those of their
kind.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_ext.arch import Arch, num_parameters
from megatron_ext.arch.attention import HEADS
from megatron_ext.arch.axes import axes_of
from megatron_ext.arch.pattern import kept_of
from megatron_ext.arch.per_layer import of_layers
from megatron_ext.arch.rows import Axis, kept_layers
from megatron_ext.pruning.plan import Plan, contradiction, sizes_of_layer
from megatron_ext.pruning.residual import NONE, Pairs, mirrored_pairs
from megatron_ext.pruning.scores import Scores
from megatron_ext.runtime.errors import CHECKPOINT, USAGE, UserError


def make_plan(
    scores: Scores | None, source: Arch, target: Arch, *, head_residual: str = NONE
) -> Plan:
    """Keep the units with the highest scores; among equal scores, those with the lower index.

    An axis whose size does not change keeps everything and needs no scores. Scores with a removal
    order (blocks of layers, or one layer at a time) remove layers by it.

    Args:
        scores: checked scores of ``source``; None if nothing has to be ranked.
        source: the model that is pruned.
        target: the model that is left, see ``target_arch``. A target of sub-layers says how many of
            each kind stay; which of them, and so the pattern, follows from the scores.
        head_residual: one of ``residual.MODES``. Without effect if all heads are kept.

    Raises:
        UserError: scores that are needed are missing, or ``target`` is no pruned ``source``; more
            than half of the heads would have to be folded, or heads of a query group that goes.
    """
    vectors = {} if scores is None else scores.vectors
    kept: dict[str, tuple[int, ...]] = {}
    whole = not target.is_hybrid
    cuts_layers = len(target.pattern) < len(source.pattern)
    if scores is not None and scores.removal_order and whole and cuts_layers:
        kept["layers"] = _not_removed(scores, source, target)
    for axis in axes_of(source if whole else source.by_sublayers()):
        for name in axis.vectors(kept):
            if name not in kept:
                sizes = sizes_of_layer(axis, name, kept, source, target)
                kept[name] = _keep(axis, name, vectors, *sizes)
    if cuts_layers and not whole:
        left = {kind: kept_layers(kept, kind) for kind in source.kinds}
        pattern = kept_of(source.pattern, left)
        in_form = target.with_sublayers if source.is_hybrid else target.with_pattern
        target = in_form(pattern)
    if "layers" in kept:
        target = replace(target, **of_layers(source, kept["layers"]))
    layers = kept_layers(kept, "attention") if head_residual != NONE else ()
    heads = {
        layer: sizes_of_layer(HEADS, f"heads.{layer}", kept, source, target) for layer in layers
    }
    folds = any(HEADS.length(after) < HEADS.length(before) for before, after in heads.values())
    plan = Plan(
        source=source,
        target=target,
        kept=kept,
        head_residual=head_residual if folds else NONE,
        residual_pairs={
            layer: _pair_heads(vectors, layer, *sizes, head_residual)
            for layer, sizes in (heads.items() if folds else ())
        },
        made={} if scores is None else _made(scores, cuts_layers=cuts_layers),
    )
    if problem := contradiction(plan):
        raise UserError(f"the target is no pruned source: {problem}.", USAGE)
    return plan


def _rank(
    axis: Axis, name: str, vectors: Mapping[str, Tensor], source: Arch, target: Arch
) -> list[list[int]]:
    """Return the units of a vector that compete with each other, the highest scores first.

    All of them, or those of each group that is kept. A group's score is the L2 norm of its units'
    scores: for heads, that of all their outputs together. A group of one unit is that unit.
    """
    scores = _needed(vectors, name)
    if axis.across is not None:  # of one unit and one of those across, which are chosen first
        other = axis.across
        left = _keep(other, name.replace(axis.name, other.name), vectors, source, target)
        scores = scores.view(axis.length(source), -1)[:, list(left)].norm(dim=1)
    groups = 1 if axis.within is None else getattr(source, axis.within.name)
    if axis.within is None or groups in (1, len(scores)):
        return [_descending(scores).tolist()]
    rows = scores.view(groups, -1)  # [groups, units of a group]
    # Numbers of units: those within the group, and the number of the group's first.
    first = rows.size(1) * torch.arange(groups).unsqueeze(1)
    rankings = (_descending(rows) + first).tolist()
    left = highest(rows.norm(dim=1), getattr(target, axis.within.name))
    return [rankings[group] for group in left]


def _keep(
    axis: Axis, name: str, vectors: Mapping[str, Tensor], source: Arch, target: Arch
) -> tuple[int, ...]:
    length, count = axis.length(source), axis.length(target)
    if count == length:
        return tuple(range(length))
    rankings = _rank(axis, name, vectors, source, target)
    each = count // len(rankings)
    return tuple(sorted(itertools.chain(*(ranking[:each] for ranking in rankings))))


def _pair_heads(
    vectors: Mapping[str, Tensor], layer: int, source: Arch, target: Arch, head_residual: str
) -> Pairs:
    if _heads_per_group(source) > 1 and target.num_query_groups < source.num_query_groups:
        raise UserError(
            f"--head-residual {head_residual} folds a head into another of its query group, and "
            "--target-num-query-groups removes whole groups: use one of them.",
            USAGE,
        )
    if target.num_attention_heads == source.num_attention_heads:
        return ()
    rankings = _rank(HEADS, f"heads.{layer}", vectors, source, target)
    count = target.num_attention_heads // len(rankings)
    return tuple(sorted(itertools.chain(*(mirrored_pairs(each, count) for each in rankings))))


def _heads_per_group(arch: Arch) -> int:
    return arch.num_attention_heads // arch.num_query_groups


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


def _shown(plan: Plan, name: str) -> tuple[str, str, str]:
    """Return a size before and after, and the share that is left, on average over layers."""
    before, after = (arch.values(name) for arch in (plan.source, plan.target))
    share = (sum(after) / len(after)) / (sum(before) / len(before))
    return plan.source.span(name, ","), plan.target.span(name, ","), f"{share:.0%}"


def summary(plan: Plan) -> str:
    """Return a table of what was cut."""
    names = [size.name for axis in plan.axes for size in axis.sizes]
    rows = [("", "source", "pruned", "kept"), *((name, *_shown(plan, name)) for name in names)]
    for name, embeddings in (("parameters", True), ("without embeddings", False)):
        before, after = (
            num_parameters(arch, embeddings=embeddings) for arch in (plan.source, plan.target)
        )
        rows.append((name, f"{before:,}", f"{after:,}", f"{after / before:.0%}"))
    if plan.target.is_hybrid:
        rows.append(("hybrid_layer_pattern", plan.source.pattern, plan.target.pattern, ""))
    return "\n".join(f"{a:36}{b:>18}{c:>18}{d:>8}" for a, b, c, d in rows)
