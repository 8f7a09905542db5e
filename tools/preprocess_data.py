"""Text to a Megatron dataset: <prefix>_<key>_document.bin and .idx, one pair per JSON key.

    python tools/preprocess_data.py --input corpus/*.jsonl --output-prefix data/corpus \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model NAME --append-eod --workers 8

A .txt file is one document; every other file holds one JSON object per line. Documents keep the
order of the input, whatever the number of workers. The output appears when all of it is done.
"""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.cli.megatron_flags import NeededTokenizer
from megatron_ext.cli.parser import REQUIRED, flag, parse
from megatron_ext.data.vocabulary import check_tokenizer_file
from megatron_ext.runtime import heavy
from megatron_ext.runtime.errors import DATA, UserError, run_main

FOLDER_SUFFIXES = (".jsonl", ".json", ".txt")


@dataclass(frozen=True, kw_only=True)
class Files:
    """Files."""

    input: tuple[str, ...] = flag(REQUIRED, "files, patterns, or folders of .jsonl, .json, .txt")
    json_keys: tuple[str, ...] = flag(("text",), "keys of the text in a JSON object")
    output_prefix: str = flag(REQUIRED, "path of the output, without _<key>_document.bin")
    append_eod: bool = flag(False, "end every document with the end-of-document token")
    workers: int = flag(1, "processes that tokenize", at_least=1)
    log_interval: int = flag(
        1000, "documents between progress lines where there is no terminal", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class PreprocessFlags:
    """Tokenize text into a Megatron dataset."""

    files: Files
    tokenizer: NeededTokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Tokenize what the command line names and print what was written."""
    flags = parse(PreprocessFlags, argv)
    paths = find_inputs(flags.files.input)
    check_tokenizer_file(flags.tokenizer)
    with heavy.imports():
        from megatron_ext.data import preprocessing
    preprocessing.preprocess(flags, paths)


def find_inputs(typed: Sequence[str]) -> list[str]:
    """Return the files that ``--input`` names; those of a folder or a pattern are sorted."""
    found: list[str] = []
    for name in typed:
        if os.path.isdir(name):
            inside = sorted(str(p) for p in Path(name).rglob("*") if p.suffix in FOLDER_SUFFIXES)
        else:
            inside = [name] if os.path.isfile(name) else sorted(glob.glob(name, recursive=True))
        if not inside:
            raise UserError(f"--input {name}: no such file, or none inside.", DATA)
        found += inside
    return found


if __name__ == "__main__":
    run_main(main)
