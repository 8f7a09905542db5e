"""From-scratch's corpus: the text that is on every machine with Python, and a tokenizer for it.

    python examples/from-scratch/corpus.py --output DIR [--vocab-size 2048]

Source files of the standard library, and Python's own documentation topics, one document each:
DIR/train.jsonl, DIR/valid.jsonl (about every twentieth document), and DIR/tokenizer.model
(SentencePiece BPE, trained on the training part). The same bytes on every run of one Python.
"""

import ast
import hashlib
import importlib
import io
import json
import sysconfig
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from tqdm import tqdm

from megatron_ext.cli.parser import REQUIRED, flag, parse
from megatron_ext.runtime.errors import run_main

# Tests and test data, other people's packages, demos, one file of tables per character set.
SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idle_test",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
VALIDATION_SHARE = 0.05
LITERALS = (
    ast.Constant,
    ast.Dict,
    ast.List,
    ast.Set,
    ast.Tuple,
    ast.UnaryOp,
    ast.unaryop,
    ast.expr_context,
)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Corpus."""

    output: str = flag(REQUIRED, "folder to write to")
    vocab_size: int = flag(2048, "pieces of the tokenizer", at_least=512)
    texts_only: bool = flag(False, "train no tokenizer")


@dataclass(frozen=True, kw_only=True)
class CorpusFlags:
    """Write from-scratch's text and tokenizer."""

    corpus: Corpus


def main(argv: Sequence[str] | None = None) -> None:
    """Write the three files and print what is in them."""
    flags = parse(CorpusFlags, argv).corpus
    folder = Path(flags.output)
    folder.mkdir(parents=True, exist_ok=True)

    documents = library_sources(Path(sysconfig.get_paths()["stdlib"])) | documentation_topics()
    parts: dict[str, dict[str, str]] = {"train": {}, "valid": {}}
    for source, text in documents.items():
        parts["valid" if is_validation(source) else "train"][source] = text

    for name, part in parts.items():
        path = folder / f"{name}.jsonl"
        lines = [json.dumps({"text": text, "source": source}) for source, text in part.items()]
        path.write_text("\n".join(lines) + "\n")
        size = sum(len(text.encode()) for text in part.values())
        print(f"{path}: {len(part)} documents, {size / 1e6:.1f} MB")
    if not flags.texts_only:
        write_tokenizer(folder / "tokenizer.model", parts, flags.vocab_size)


def write_tokenizer(path: Path, parts: Mapping[str, Mapping[str, str]], vocab_size: int) -> None:
    """Train a tokenizer on the training part, write it, and count the tokens of both parts."""
    print(f"training a tokenizer of {vocab_size} pieces", flush=True)
    model = train_tokenizer(parts["train"].values(), vocab_size)
    path.write_bytes(model)
    print(f"{path}: {len(model) / 1e3:.0f} kB")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for name, part in parts.items():
        texts = tqdm(part.values(), f"counting the tokens of {name}", disable=None)
        print(f"{name}: {sum(len(processor.encode(text)) for text in texts):,} tokens")


def library_sources(root: Path) -> dict[str, str]:
    """Return the text of the library's source files by path below ``root``, sorted."""
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    texts = {}
    for path in tqdm(paths, "reading the standard library", disable=None):
        if SKIPPED_FOLDERS.isdisjoint(path.parts):
            with tokenize.open(root / path) as stream:  # honours the file's declared encoding
                text = stream.read()
            if text.strip() and not is_table(text):
                texts[path.as_posix()] = text
    return texts


def documentation_topics() -> dict[str, str]:
    """Return the texts of Python's ``help()`` by name; none where they are not installed."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        return {}
    return {f"pydoc_data/topics/{name}": topics[name] for name in sorted(topics)}


def is_table(source: str) -> bool:
    """Tell if most lines of a Python file belong to literals, such as character tables."""
    lines = 0
    for node in ast.parse(source).body:
        is_literal = isinstance(node, ast.Assign) and all(
            isinstance(part, LITERALS) for part in ast.walk(node.value)
        )
        if is_literal:
            lines += node.end_lineno - node.lineno + 1
    return lines > 0.5 * source.count("\n")


def is_validation(source: str) -> bool:
    """Decide by the name alone, so that another document changes nothing for this one."""
    digest = hashlib.sha256(source.encode()).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Return a SentencePiece BPE model that gives back every text exactly, indentation included.

    Bytes stand for rare characters, and a newline is a piece of its own. Ids 0, 1, 2 are unk, bos
    and eos; eos ends documents.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.9999,
        user_defined_symbols=["\n"],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


if __name__ == "__main__":
    run_main(main)
