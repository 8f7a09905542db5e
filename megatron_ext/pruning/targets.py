"""Sizes to prune to: typed, or of a file, checked against the model that is pruned. Pure."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.arch import Arch
from megatron_ext.arch.axes import DEPTH_SIZES, SIZES, has_sublayers, sizes_of
from megatron_ext.arch.pattern import without_last
from megatron_ext.arch.per_layer import NAMES, of_layers
from megatron_ext.runtime.errors import USAGE, UserError


def target_arch(source: Arch, **sizes: int | None) -> Arch:
    """Return ``source`` with some sizes replaced; None keeps one.

    Which sub-layers stay is not known yet: of ``attention_layers`` and ``mlp_layers`` the first
    ones stand in for them in the pattern, see ``same_sizes``.

    Where each query head has its own key and value (no query groups), these go with the head. Where
    query groups go and no number of heads is given, the groups that stay keep all of theirs.

    Raises:
        UserError: a size that cannot be pruned to.
    """
    changed: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    for name, size in changed.items():
        check_size(source, name, size)
    changed = _with_pattern(source, changed)
    heads, groups = source.num_attention_heads, source.num_query_groups
    if groups == heads:
        both = [changed[n] for n in ("num_attention_heads", "num_query_groups") if n in changed]
        if len(set(both)) > 1:
            raise UserError(
                f"--target-num-attention-heads {both[0]} and --target-num-query-groups {both[1]}: "
                "every head of the checkpoint is a query group of its own; give one of them.",
                USAGE,
            )
        if both:
            changed |= {"num_attention_heads": both[0], "num_query_groups": both[0]}
    groups = changed.get("num_query_groups", groups)
    heads = changed.setdefault("num_attention_heads", heads // source.num_query_groups * groups)
    if heads % groups or heads // groups > source.num_attention_heads // source.num_query_groups:
        raise UserError(
            f"--target-num-attention-heads {heads}: each of {groups} query groups keeps the same "
            f"number of its {source.num_attention_heads // source.num_query_groups} heads.",
            USAGE,
        )
    if changed.get("num_experts", source.moe_router_topk) < source.moe_router_topk:
        raise UserError(
            f"--target-num-experts {changed['num_experts']}: the router sends a token to "
            f"{source.moe_router_topk} experts (moe_router_topk).",
            USAGE,
        )
    # Which layers stay is not known yet either: the first ones stand in for them.
    layers = range(changed.get("num_layers", source.num_layers))
    return replace(source, **changed, **of_layers(source, layers))


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


def read_targets(path: str | os.PathLike, source: Arch) -> dict[str, Arch]:
    """Return the targets of a YAML file, ``name: {hidden_size: N, ...}`` with Megatron's sizes.

    Raises:
        UserError: it cannot be read, or names a size that cannot be pruned or pruned to.
    """
    try:
        entries = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
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
            if size not in SIZES or type(value) is not int:
                raise UserError(
                    f"{where}: {size}: {value!r}: choose whole numbers for {', '.join(SIZES)}.",
                    USAGE,
                )
        try:
            targets[name] = target_arch(source, **sizes)
        except UserError as error:
            raise UserError(f"{where}: {error}", USAGE) from error
    return targets


def check_size(source: Arch, name: str, size: int) -> None:
    """Raise ``UserError`` unless ``source`` has units of this kind, and at least so many."""
    if getattr(source, name) and name in DEPTH_SIZES and name not in sizes_of(source):
        if problem := _depth_problem(source):
            raise UserError(f"{_option(name)} {size}: {problem}.", USAGE)
    elif name not in sizes_of(source):
        raise UserError(f"{_option(name)} {size}: the checkpoint's model has none.", USAGE)
    length = getattr(source, name)
    if not 1 <= size <= length:
        raise UserError(
            f"{_option(name)} {size}: choose from 1 to the checkpoint's {length}.", USAGE
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
