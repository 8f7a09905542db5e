"""Sizes to prune to: typed, or of a file, checked against the model that is pruned. Pure."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.arch import Arch
from megatron_ext.arch.axes import DEPTH_SIZES, SIZES, axes_of, has_sublayers, sizes_of
from megatron_ext.arch.pattern import without_last
from megatron_ext.arch.per_layer import NAMES, of_layers
from megatron_ext.arch.rows import Axis
from megatron_ext.arch.sizes import BY_LAYER
from megatron_ext.runtime.errors import USAGE, UserError
from megatron_ext.runtime.texts import parse_yaml

Sizes = int | Sequence[int]
"""One for all layers, or one for each that stays, first to last."""


def target_arch(source: Arch, **sizes: Sizes | None) -> Arch:
    """Return ``source`` with some sizes replaced; None keeps one.

    Which sub-layers stay is not known yet: of ``attention_layers`` and ``mlp_layers`` the first
    ones stand in for them in the pattern, see ``same_sizes``. Sizes that differ from layer to layer
    go by the order of those that stay, and make the target a HybridModel.

    Where each query head has its own key and value (no query groups), these go with the head. Where
    query groups go and no number of heads is given, the groups that stay keep all of theirs.

    Raises:
        UserError: a size that cannot be pruned to.
    """
    typed = {name: size for name, size in sizes.items() if size is not None}
    for name, size in typed.items():
        check_size(source, name, size)
    whole: dict[str, Any] = {name: size for name, size in typed.items() if name not in BY_LAYER}
    if whole.get("num_experts", source.moe_router_topk) < source.moe_router_topk:
        raise UserError(
            f"--target-num-experts {whole['num_experts']}: the router sends a token to "
            f"{source.moe_router_topk} experts (moe_router_topk).",
            USAGE,
        )
    for axis in axes_of(source):
        if axis.within is not None and axis.size.name not in BY_LAYER:
            whole |= _in_groups(source, axis, whole)
    # Which layers stay is not known yet either: the first ones stand in for them.
    first = of_layers(source, range(whole.get("num_layers", source.num_layers)))
    target = replace(source, by_layer=(), **_with_pattern(source, whole), **first)
    values: dict[str, Sequence[int]] = {}
    for kind in set(source.kinds) & set(BY_LAYER.values()):
        mine = {name: size for name, size in typed.items() if BY_LAYER.get(name) == kind}
        values |= _sizes_of_layers(source, kind, mine, len(target.layers_of(kind)))
    try:
        target = target.with_sizes(values)
    except ValueError as error:  # it has no sub-layers to differ
        raise UserError(f"sizes for each layer: {error}", USAGE) from None
    if target.by_layer and whole.get("num_layers", source.num_layers) < source.num_layers:
        raise UserError(
            f"--target-num-layers {whole['num_layers']} and {_option(target.by_layer[0][0])} with "
            "a value for each layer: remove whole layers in a run before, or sub-layers with "
            "--target-attention-layers and --target-mlp-layers.",
            USAGE,
        )
    return target


def _sizes_of_layers(
    source: Arch, kind: str, typed: Mapping[str, Sizes], count: int
) -> dict[str, tuple[int, ...]]:
    """Return the sizes of the ``count`` sub-layers of a kind that stay; one value if all alike."""
    lists = {name: size for name, size in typed.items() if not isinstance(size, int)}
    ones = {name: size for name, size in typed.items() if isinstance(size, int)}
    for name, values in lists.items():
        if len(values) != count:
            raise UserError(
                f"{_option(name)}: {len(values)} values for {count} {kind} sub-layers that stay.",
                USAGE,
            )
    differ, there = len(source.alike(kind)) > 1, len(source.layers_of(kind))
    layers = [source] * (count if lists else 1)
    if differ:
        layers = [source.at(kind, number) for number in range(there)]
    found = []
    for number, layer in enumerate(layers if count == there or not lists else layers[:count]):
        mine = ones | {name: values[number] for name, values in lists.items()}
        found.append(_sizes_of_layer(layer, kind, mine, number))
    if differ and count < there and (lists or any(each != found[0] for each in found)):
        names = ", ".join(name for name, _ in source.by_layer if BY_LAYER[name] == kind)
        raise UserError(
            f"--target-{kind}-layers {count}: the {kind} sub-layers of the checkpoint differ in "
            f"{names}, and which of them stay is not known yet; prune all to one size too.",
            USAGE,
        )
    found = found[:1] if differ and count < there else found
    return {name: tuple(each[name] for each in found) for name in found[0]}


def _sizes_of_layer(
    source: Arch, kind: str, typed: Mapping[str, int], number: int
) -> dict[str, int]:
    """Return the sizes of one sub-layer; ``source`` has those of it before."""
    for name, size in typed.items():
        if size > getattr(source, name):
            raise UserError(
                f"{_option(name)} {size}: the {kind} sub-layer {number} (from 0) of the checkpoint "
                f"has {getattr(source, name)}.",
                USAGE,
            )
    names = [name for name, each in BY_LAYER.items() if each == kind]
    sizes = {name: getattr(source, name) for name in names} | dict(typed)
    for axis in axes_of(source):
        if axis.within is not None and axis.size.name in sizes:
            sizes |= _in_groups(source, axis, typed)
    return sizes


def _in_groups(source: Arch, axis: Axis, typed: Mapping[str, Any]) -> dict[str, int]:
    """Return both sizes of an axis whose units come in groups, as heads in query groups."""
    assert axis.within is not None
    units, within, noun = axis.size.name, axis.within.name, axis.within.noun
    before, groups_before = getattr(source, units), getattr(source, within)
    if groups_before == before:
        both = [typed[name] for name in (units, within) if name in typed]
        if len(set(both)) > 1:
            raise UserError(
                f"{_option(units)} {both[0]} and {_option(within)} {both[1]}: every head of the "
                f"checkpoint is a {noun.removesuffix('s')} of its own; give one of them.",
                USAGE,
            )
        if both:
            return {units: both[0], within: both[0]}
    groups = typed.get(within, groups_before)
    count = typed.get(units, before // groups_before * groups)
    if count % groups or count // groups > before // groups_before:
        raise UserError(
            f"{_option(units)} {count}: each of {groups} {noun} keeps the same number of its "
            f"{before // groups_before} heads.",
            USAGE,
        )
    return {units: count, within: groups}


def _with_pattern(source: Arch, sizes: dict[str, int]) -> dict[str, Any]:
    """Return sizes in which a pattern stands for how many sub-layers of each kind are left."""
    typed = [name for name in sizes if name in DEPTH_SIZES]
    if "num_layers" in typed and len(typed) > 1:
        raise UserError(
            f"{_option(typed[0])} {sizes[typed[0]]} and {_option(typed[1])} {sizes[typed[1]]}: "
            "remove whole layers or sub-layers, not both.",
            USAGE,
        )
    numbers = {kind: len(source.layers_of(kind)) for kind in source.kinds}
    counts = {kind: sizes.get(f"{kind}_layers", number) for kind, number in numbers.items()}
    sublayers = {f"{kind}_layers" for kind in numbers}
    changed: dict[str, Any] = {name: n for name, n in sizes.items() if name not in sublayers}
    if counts != numbers:
        pattern = without_last(source.pattern, counts)
        changed |= {"num_layers": len(pattern), "hybrid_layer_pattern": pattern}
    return changed


def same_sizes(first: Arch, second: Arch) -> bool:
    """Whether two models differ at most in which layers or sub-layers of each kind they have."""
    if not (has_sublayers(first) and has_sublayers(second)):
        none: dict[str, Any] = dict.fromkeys(NAMES)
        return replace(first, **none) == replace(second, **none)
    hybrids = [arch.by_sublayers() for arch in (first, second)]
    one, other = (
        replace(arch, hybrid_layer_pattern="".join(sorted(arch.pattern))) for arch in hybrids
    )
    return one == other


def leaves_out_sublayers(source: Arch, target: Arch) -> bool:
    """Whether ``target`` has sub-layers of its own and fewer than ``source``."""
    return target.is_hybrid and len(target.pattern) < len(source.pattern)


def read_targets(path: str | os.PathLike, source: Arch) -> dict[str, Arch]:
    """Return the targets of a YAML file, ``name: {hidden_size: N, ...}`` with Megatron's sizes.

    Raises:
        UserError: it cannot be read, or names a size that cannot be pruned or pruned to.
    """
    try:
        entries = parse_yaml(Path(path).read_text())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--targets {path} cannot be read: {reason}.", USAGE) from error
    is_table = isinstance(entries, dict) and all(isinstance(e, dict) for e in entries.values())
    if not is_table or not entries:
        raise UserError(f"--targets {path}: needs lines like 'half: {{hidden_size: 2048}}'.", USAGE)
    targets = {}
    for name, sizes in entries.items():
        where = f"--targets {path}: {name}"
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
            raise UserError(f"{where}: a target's name is the name of its folder.", USAGE)
        for size, value in sizes.items():
            is_list = size in BY_LAYER and isinstance(value, list) and value
            if size not in SIZES or any(
                type(x) is not int for x in (value if is_list else [value])
            ):
                raise UserError(
                    f"{where}: {size}: {value!r}: choose whole numbers for {', '.join(SIZES)}; "
                    f"lists, one for each layer that stays, for {', '.join(BY_LAYER)}.",
                    USAGE,
                )
        try:
            targets[name] = target_arch(source, **sizes)
        except UserError as error:
            raise UserError(f"{where}: {error}", USAGE) from error
    return targets


def check_size(source: Arch, name: str, size: Sizes) -> None:
    """Raise ``UserError`` unless ``source`` has units of this kind, and at least so many.

    A list is compared with the layer that has most: ``target_arch`` compares layer by layer.
    """
    if getattr(source, name) and name in DEPTH_SIZES and name not in sizes_of(source):
        if problem := _depth_problem(source):
            raise UserError(f"{_option(name)} {size}: {problem}.", USAGE)
    elif name not in sizes_of(source):
        raise UserError(f"{_option(name)} {size}: the checkpoint's model has none.", USAGE)
    lengths = source.values(name)
    values, length = ([size], min(lengths)) if isinstance(size, int) else (size, max(lengths))
    for value in values:
        if not 1 <= value <= length:
            raise UserError(
                f"{_option(name)} {value}: choose from 1 to the checkpoint's {length}.", USAGE
            )


def _depth_problem(source: Arch) -> str | None:
    """Return why what is no layer of ``source`` as it is built cannot be removed, or None."""
    if source.is_hybrid:
        way_out = ", or make whole layers of them (convert layers --to gpt)"
        return (
            f"the checkpoint's layers are sub-layers, {source.pattern}; use "
            f"--target-attention-layers and --target-mlp-layers{way_out * source.has_whole_layers}"
        )
    if not has_sublayers(source):
        kind = "BertModel" if source.is_bert else "model whose layers differ"
        return f"of a {kind} whole layers are removed; use --target-num-layers"
    return None


def _option(name: str) -> str:
    return f"--target-{name.replace('_', '-')}"
