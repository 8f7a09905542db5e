"""Switches that each layer has: Megatron-LM's lists of 0 and 1, as the text that its flags take.

``Arch`` holds ``[0,0,0,1]``, one for each layer, or None where no layer differs. Flags and saved
args may also say a frequency, N, or a list by its expression, ``([0]*3+[1])*8``.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ext.arch.sizes import Arch

# What a frequency of N switches in every N-th layer, and in the others.
FREQUENCIES = {"no_rope_freq": (1, 0), "window_attn_skip_freq": (0, 1)}
NAMES = tuple(FREQUENCIES)


def text(values: Sequence[int]) -> str:
    """Return switches as Megatron-LM's flag takes them."""
    return f"[{','.join(str(int(value)) for value in values)}]"


def switches(arch: "Arch", name: str) -> list[int] | None:
    """Return one switch for each layer, or None where none is set apart."""
    value = getattr(arch, name)
    return None if value is None else ast.literal_eval(value)


def expanded(sizes: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Return ``sizes`` with these of ``NAMES`` as ``Arch`` holds them.

    Raises:
        ValueError: a value is no frequency and no list of 0 and 1 for each layer.
    """
    found = dict(sizes)
    for name in NAMES:
        if found.get(name) is None:
            continue
        values = _values(name, found[name], num_layers)
        if len(values) != num_layers or not set(values) <= {0, 1}:
            raise ValueError(
                f"--{name.replace('_', '-')} {found[name]}: write a frequency, or a 0 or 1 for "
                f"each of {num_layers} layers, as '[0,0,0,1]' or '([0]*3+[1])*8'."
            )
        found[name] = None if set(values) == {FREQUENCIES[name][1]} else text(values)
    return found


def of_layers(arch: "Arch", layers: Sequence[int]) -> dict[str, Any]:
    """Return these settings for the model of some layers of ``arch``, by number."""
    return expanded(
        {
            name: None if values is None else [values[layer] for layer in layers]
            for name in NAMES
            for values in [switches(arch, name)]
        },
        len(layers),
    )


def problems(arch: "Arch") -> Iterator[str]:
    """Yield what else of a model they do not go with."""
    for name in NAMES:
        values = switches(arch, name)
        if values is not None and len(values) != arch.num_layers:
            yield f"{name} is of {len(values)} layers, the model has {arch.num_layers}."
        if values is not None and (arch.is_hybrid or arch.is_bert):
            kind = "--hybrid-layer-pattern" if arch.is_hybrid else "--bert-no-binary-head"
            yield f"--{name.replace('_', '-')} does not go with {kind}."


def _values(name: str, value: Any, num_layers: int) -> list[int]:
    if isinstance(value, str):
        value = _evaluated(value)
    if isinstance(value, int) and value >= 0:
        every, others = FREQUENCIES[name]
        number = value or num_layers + 1  # 0 for none
        return [others if layer % number else every for layer in range(1, num_layers + 1)]
    return list(value) if isinstance(value, list | tuple) else []


def _evaluated(words: str) -> Any:
    """Return the value of a list's expression: whole numbers, lists, + and *; None of any other."""

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.List(elts=items):
                return [value(item) for item in items]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
        raise ValueError(words)

    try:
        return value(ast.parse(words, mode="eval").body)
    except (SyntaxError, ValueError, TypeError):
        return None
