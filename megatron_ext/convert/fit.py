"""Whether a model that is pruned can leave again, asked before it is made. Pure."""

from collections.abc import Iterator

from megatron_ext.arch import Arch
from megatron_ext.arch.axes import sizes_of
from megatron_ext.convert.config import Config, config_of
from megatron_ext.convert.families import FAMILIES
from megatron_ext.convert.family import Family
from megatron_ext.pruning.targets import target_arch
from megatron_ext.runtime.errors import USAGE, UserError

# What families tie to other sizes.
TIED = ("hidden_size", "num_attention_heads")


def problem_of(arch: Arch, family: Family, origin: Config) -> str | None:
    """Return why ``family`` has no model of ``arch``, or None: what an export would say."""
    try:
        config_of(arch, family, origin, "bfloat16")
    except ValueError as error:
        return str(error)
    return None


def check_target(target: Arch, source: Arch, origin: Config) -> None:
    """Refuse to prune to what cannot be exported, but for models of sub-layers: ``export_note``.

    Args:
        target: the sizes to prune to.
        source: of the model that is pruned.
        origin: the config.json that it was imported from; empty for a model of another origin, of
            which nothing is known.

    Raises:
        UserError: no family holds the target; the nearest sizes that its own holds are named.
    """
    problem = None if target == source or target.is_hybrid else _problem(target, origin)
    if problem and not holders(target):
        sizes = fitting_sizes(target, source, origin)
        raise UserError(f"the target cannot be exported: {problem}{sizes}.", USAGE)


def export_note(target: Arch, source: Arch, origin: Config) -> str | None:
    """Return what an export of ``target`` takes, where its own family does not hold it."""
    problem = None if target == source else _problem(target, origin)
    if not problem:
        return None
    if target.by_layer:
        return (
            "what is pruned cannot be exported: no Hugging Face family here has layers that differ."
        )
    if target.is_hybrid:
        return (
            "what is pruned cannot be exported, unless the sub-layers that stay are whole layers: "
            "no Hugging Face family is here for the others."
        )
    other, sizes = holders(target)[0], fitting_sizes(target, source, origin)
    return f"what is pruned can be exported with --model-type {other}: {problem}{sizes}."


def holders(arch: Arch) -> list[str]:
    """Return the families that have models of ``arch``."""
    return [name for name, family in FAMILIES.items() if problem_of(arch, family, {}) is None]


def serving_note(arch: Arch, family: Family) -> str | None:
    """Return which engine cannot load a model of ``family`` that transformers loads, or None."""
    hidden, heads = arch.hidden_size, arch.num_attention_heads
    if not family.served_apart or arch.kv_channels == hidden // heads:
        return None
    return (
        f"{family.served_apart} reads no head_dim of {family.model_type} and takes {hidden} // "
        f"{heads}, not {arch.kv_channels}: it cannot load this model; transformers does."
    )


def fitting_sizes(target: Arch, source: Arch, origin: Config) -> str:
    """Return the nearest sizes that the family of ``origin`` holds, as the end of a message."""
    found = list(_nearest(target, source, origin))
    return f"; the nearest that fit: {', '.join(found)}" if found else ""


def _problem(target: Arch, origin: Config) -> str | None:
    family = FAMILIES.get(origin.get("model_type"))
    return family and problem_of(target, family, origin)


def _nearest(target: Arch, source: Arch, origin: Config) -> Iterator[str]:
    """Yield, for each tied size, the first below and above that fits when it alone changes."""
    sizes = {name: getattr(target, name) for name in sizes_of(source)}
    for name in TIED:
        tied = ("num_query_groups",) * (
            name == "num_attention_heads" and source.num_query_groups == source.num_attention_heads
        )
        below = range(sizes[name] - 1, 0, -1)
        above = range(sizes[name] + 1, getattr(source, name) + 1)
        for values in (below, above):
            for value in values:
                changed = sizes | dict.fromkeys((name, *tied), value)
                if _fits(changed, source, origin):
                    yield f"--target-{name.replace('_', '-')} {value}"
                    break


def _fits(sizes: dict[str, int], source: Arch, origin: Config) -> bool:
    try:
        return _problem(target_arch(source, **sizes), origin) is None
    except UserError:
        return False
