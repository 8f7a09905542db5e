"""Frozen dataclasses as command-line flags: the machinery, without any flag.

    @dataclass(frozen=True, kw_only=True)
    class Batch:                                      a group; the docstring is its title in --help
        micro_batch_size: int = flag(REQUIRED, "samples of one forward pass", at_least=1)

    @dataclass(frozen=True, kw_only=True)
    class Flags:                                      a program: one field per group
        batch: Batch
        sizes: Annotated[dict[str, Any], Sizes]       as a dict: what was typed, no defaults

``read`` turns argv into a dict of what was typed, ``build`` turns that into ``Flags``. Defaults
live in the dataclasses only. Types: bool, int, float, str, each or None, and tuple[str, ...].
"""

import argparse
import dataclasses
import difflib
import math
import operator
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from megatron_ext.cli.option_rows import Option, judge
from megatron_ext.runtime.errors import USAGE, UserError

REQUIRED: Any = dataclasses.MISSING
BOUNDS = {
    "at_least": (operator.ge, ">="),
    "above": (operator.gt, ">"),
    "at_most": (operator.le, "<="),
    "below": (operator.lt, "<"),
}
LARGEST = 2**63 - 1
"""Whole numbers become int64 somewhere."""
METAVARS = {int: "N", float: "X", str: "TEXT"}
OTHERS = (
    "Every other option of Megatron-LM is known: typed, it is refused, or named as one without "
    "effect, with the reason."
)


def flag(
    default: Any,
    help: str,
    *,
    off: str | None = None,
    aliases: Sequence[str] = (),
    shorthands: Mapping[str, Any] | None = None,
    choices: Sequence[str] | None = None,
    setting: str | None = None,
    read: Callable[[str], Any] | None = None,
    **bounds: float,
) -> Any:
    """Declare one flag as a dataclass field; its option is ``--`` and the field's name.

    Args:
        default: the value where the flag is not typed; ``REQUIRED`` for none.
        help: unit and the meaning of special values.
        off: the option that turns a bool off whose default is True; there is none to turn it on.
        aliases: other spellings of the option.
        shorthands: option without a value -> the value it stands for.
        choices: the allowed values.
        setting: the setting of megatron-core's TransformerConfig that takes the value as it is, of
            flags in the group of the layout (``settings_of``, in ``model.options``); one that
            ``model.build`` does not fill itself.
        read: makes the value of the text, in place of the type; raises ``ArgumentTypeError``.
        bounds: ``at_least``, ``above``, ``at_most``, ``below``: limits of a number, or of each.
    """
    assert bounds.keys() <= BOUNDS.keys(), bounds
    assert default is not True or off, "a switch that is on needs an option that turns it off"
    metadata = {
        "help": help,
        "off": off,
        "aliases": tuple(aliases),
        "shorthands": shorthands or {},
        "choices": choices,
        "setting": setting,
        "read": read,
        "bounds": bounds,
    }
    return dataclasses.field(default=default, metadata=metadata)


def groups(program: type) -> dict[str, type]:
    """Return the dataclass of each group of ``program``, by field name."""
    hints = typing.get_type_hints(program, include_extras=True)
    return {name: getattr(hint, "__metadata__", (hint,))[0] for name, hint in hints.items()}


def flag_fields(program: type) -> Iterator[dataclasses.Field]:
    """Yield the field of every flag of ``program``."""
    for group in groups(program).values():
        yield from dataclasses.fields(group)


def settings_of(group: Any) -> dict[str, Any]:
    """Return the settings of megatron-core that flags of ``group`` (an instance) stand for."""
    named = {f.name: f.metadata["setting"] for f in dataclasses.fields(group)}
    return {setting: getattr(group, name) for name, setting in named.items() if setting}


def dashed(name: str) -> str:
    """Return the option of a field name: ``hidden_size`` gives ``--hidden-size``."""
    return "--" + name.replace("_", "-")


def option(field: dataclasses.Field) -> str:
    """Return the option of ``field``."""
    return field.metadata["off"] or dashed(field.name)


def all_options(program: type) -> list[str]:
    """Return every option of ``program``, aliases included, sorted."""
    names = ["--help"]
    for field in flag_fields(program):
        names += [option(field), *field.metadata["aliases"], *field.metadata["shorthands"]]
    return sorted(names)


def read(program: type, argv: Sequence[str], others: Mapping[str, Option]) -> dict[str, Any]:
    """Return what ``argv`` says, by field name; nothing that was not typed.

    Args:
        program: the dataclass of groups.
        argv: the command line without the program's name.
        others: the options that are no fields; those that were typed are judged.

    Raises:
        UserError: unknown or refused flag, bad value, number out of bounds.
    """
    parser = _make_parser(program, others)
    namespace, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise UserError(_unknown_flags(unknown, [*all_options(program), *others]), USAGE)
    typed = vars(namespace)
    judge(typed.pop("others"), others)
    for field in flag_fields(program):
        if field.name in typed:
            _check_bounds(field, typed[field.name])
            if isinstance(typed[field.name], list):
                typed[field.name] = tuple(typed[field.name])
    return typed


def missing(program: type, typed: Mapping[str, Any]) -> list[str]:
    """Return the options of the required flags that were not typed."""
    required = [field for field in flag_fields(program) if field.default is REQUIRED]
    return [option(field) for field in required if field.name not in typed]


def build[Program](program: type[Program], typed: Mapping[str, Any]) -> Program:
    """Return ``program`` with the typed values and, elsewhere, the groups' defaults."""
    hints, values = typing.get_type_hints(program), {}
    for name, group in groups(program).items():
        mine = {f.name: typed[f.name] for f in dataclasses.fields(group) if f.name in typed}
        values[name] = group(**mine) if hints[name] is group else mine
    return program(**values)


def parse[Program](program: type[Program], argv: Sequence[str] | None) -> Program:
    """Return the flags of a program that ignores none; ``argv`` None reads the command line.

    Raises:
        UserError: with code ``USAGE``, for what is unknown, malformed or missing.
    """
    typed = read(program, sys.argv[1:] if argv is None else argv, {})
    if absent := missing(program, typed):
        raise UserError(f"missing {' '.join(absent)}.", USAGE)
    return build(program, typed)


def options_of(group: type, reason: str, *, refused: bool = False) -> dict[str, Option]:
    """Return the options of a group of another program, which this one has not, by name."""
    hints, found = typing.get_type_hints(group), {}
    for field in dataclasses.fields(group):
        is_switch, is_many = (
            hints[field.name] is bool,
            typing.get_origin(hints[field.name]) is tuple,
        )
        nargs = 0 if is_switch else "*" if is_many else None
        neutral = () if is_switch or is_many else (str(field.default),)
        for name in (option(field), *field.metadata["aliases"]):
            found[name] = Option(nargs, neutral, reason, refused)
        for name in field.metadata["shorthands"]:
            found[name] = Option(0, (), reason, refused)
    return found


def flags_as_dict(flags: Any) -> dict[str, Any]:
    """Return every flag of a parsed program by name, in plain values that JSON can hold.

    Groups that say ``about_run = False`` are left out.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(flags):
        group = getattr(flags, field.name)
        if not getattr(group, "about_run", True):
            continue
        values |= group if isinstance(group, dict) else dataclasses.asdict(group)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def format_flags(flags: Any) -> str:
    """Return the flags in the form that Megatron-LM prints at start: people grep it."""
    lines = [f"  {name} {'.' * (48 - len(name))} {v}" for name, v in flags_as_dict(flags).items()]
    head = "------------------------ arguments ------------------------"
    tail = "-------------------- end of arguments ---------------------"
    return "\n".join([head, *sorted(lines, key=str.lower), tail])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "), USAGE)


class _Remember(argparse.Action):
    """Remember that an option was typed which is no field."""

    def __call__(self, parser: Any, namespace: Any, values: Any, name: str | None = None) -> None:
        namespace.others.append((name, [values] if isinstance(values, str) else values))


def _make_parser(program: type, others: Mapping[str, Option]) -> _Parser:
    parser = _Parser(
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        usage="%(prog)s [flags]",
        description=program.__doc__,
        epilog=OTHERS if others else None,
    )
    parser.set_defaults(others=[])
    for group in groups(program).values():
        section = parser.add_argument_group((group.__doc__ or "").rstrip("."))
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            _add(section, field, hints[field.name])
    for name, other in others.items():
        parser.add_argument(name, action=_Remember, nargs=other.nargs, help=argparse.SUPPRESS)
    return parser


def _add(section: Any, field: dataclasses.Field, hint: Any) -> None:
    meta = field.metadata
    if hint is bool:
        kwargs: dict[str, Any] = {"action": "store_false" if field.default else "store_true"}
    else:
        kind = next((t for t in typing.get_args(hint) if t in METAVARS), hint)
        kwargs = {"type": meta["read"] or kind, "choices": meta["choices"]}
        if not meta["choices"]:
            kwargs["metavar"] = METAVARS[kind]
        if typing.get_origin(hint) is tuple:
            kwargs["nargs"] = "*"
    names = [option(field), *meta["aliases"]]
    section.add_argument(*names, dest=field.name, help=_help_text(field, hint), **kwargs)
    for shorthand, value in meta["shorthands"].items():
        text = f"the same as {option(field)} {value}"
        section.add_argument(
            shorthand, dest=field.name, action="store_const", const=value, help=text
        )


def _help_text(field: dataclasses.Field, hint: Any) -> str:
    text = field.metadata["help"].replace("%", "%%")
    if field.default is REQUIRED:
        return f"{text}; required"
    # A switch is off until typed, and None and () are explained in the text.
    return (
        text if hint is bool or field.default in (None, ()) else f"{text}; default {field.default}"
    )


def _check_bounds(field: dataclasses.Field, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{option(field)} {value}: must be a finite number.", USAGE)
    if isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f"{option(field)} {value}: must be <= {LARGEST}.", USAGE)
    for name, limit in field.metadata["bounds"].items():
        holds, symbol = BOUNDS[name]
        if not all(holds(each, limit) for each in (value if type(value) is tuple else (value,))):
            raise UserError(f"{option(field)} {value}: must be {symbol} {limit}.", USAGE)


def _unknown_flags(unknown: Sequence[str], known: Sequence[str]) -> str:
    names = [word.split("=")[0] for word in unknown if word.startswith("--") and word != "--"]
    if not names:
        return f"unexpected {' '.join(unknown)}: not a flag, nor a value of the flag before it."
    close = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.7) for name in names}
    hints = [f"{name} (did you mean {c[0]}?)" if c else name for name, c in close.items()]
    return f"unknown flag {', '.join(hints)}. --help lists all flags."
