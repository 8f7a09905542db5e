"""Rows of the tables of families: where a weight stands in Hugging Face's files."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ext.convert.layouts import Layout


@dataclass(frozen=True)
class Row:
    """One weight."""

    layout: Layout
    names: tuple[str, ...]
    """Hugging Face's tensors, with {layer} and {expert} for their numbers, {before} for the number
    of the layer before, {last} for that of the last layer."""
    first: tuple[str, ...] = ()
    """In the first layer, where they have other names there."""


def row_name(key: str, rows: Mapping[str, Row]) -> str:
    """Return the name of a weight's row: its own, or without its last word.

    The second where one tensor there is several of Megatron's here, one behind the other.
    """
    return key if key in rows else key.rpartition(".")[0]


def both(key: str, layout: Layout, *names: str) -> dict[str, Row]:
    """Return the rows of a weight and of its bias, whose names differ in their last word."""
    return {
        f"{key}{kind}": Row(layout, tuple(f"{name}.{kind}" for name in names))
        for kind in ("weight", "bias")
    }
