"""Blends of data that stand in a file instead of on the command line."""

from dataclasses import replace
from pathlib import Path

from megatron_ext.cli.megatron_flags import Data
from megatron_ext.runtime.errors import DATA, UserError
from megatron_ext.runtime.texts import parse_json

SPLITS = {"train": "train_data_path", "valid": "valid_data_path", "test": "test_data_path"}


def with_data_args(data: Data) -> Data:
    """Return ``data`` with the words of --data-args-path and --per-split-data-args-path in place.

    Raises:
        UserError: a file cannot be read, or does not hold words of --data-path.
    """
    if data.data_args_path is not None:
        words = _read("--data-args-path", data.data_args_path).split()
        if not words:
            raise UserError(f"--data-args-path {data.data_args_path}: the file is empty.", DATA)
        data = replace(data, data_path=tuple(words))
    path = data.per_split_data_args_path
    if path is None:
        return data
    try:
        found = parse_json(_read("--per-split-data-args-path", path))
        blends = {SPLITS[split]: tuple(map(str, words or ())) for split, words in found.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"--per-split-data-args-path {path}: not of the form "
            f'{{"train": [...], "valid": [...], "test": [...]}} ({error}).',
            DATA,
        ) from error
    # Pruning reads the training split only; its group of flags has no others.
    names = type(data).__dataclass_fields__
    return replace(data, **{name: words for name, words in blends.items() if name in names})


def _read(option: str, path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path} cannot be read: {error}.", DATA) from error
