"""Whether a tokenizer is a checkpoint's own, and whether two models can be compared. Pure."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.arch import Arch
from megatron_ext.checkpoint.folder import TOKENIZER, Checkpoint
from megatron_ext.runtime.errors import CHECKPOINT, UserError


def with_own_tokenizer(options: Any, *sources: Checkpoint | None) -> Any:
    """Return ``options``, a ``megatron_flags.Tokenizer``; where no type is typed, a checkpoint's.

    That is the Hugging Face tokenizer beside the first of ``sources`` that has one. A teacher
    stands before its student, whose folder changes whenever a run goes on.
    """
    for source in filter(None, sources) if options.tokenizer_type is None else ():
        folder = source.folder / TOKENIZER
        if any(folder.glob("tokenizer*")) or any(folder.glob("vocab*")):
            kind = "HuggingFaceTokenizer"
            return replace(options, tokenizer_type=kind, tokenizer_model=str(folder))
    return options


def tokenizer_sha256(data: Any) -> str | None:
    """Return the SHA-256 of the tokenizer's files, or None if it is not made of local files.

    Saved with a checkpoint, it tells two tokenizers of the same size apart.
    """
    paths = [Path(p) for p in (data.tokenizer_model, data.vocab_file, data.merge_file) if p]
    if not paths or not all(path.is_file() for path in paths):
        return None
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def check_tokenizer(source: Checkpoint, vocab_size: int, sha256: str | None) -> None:
    """Refuse a tokenizer that is not the one ``source`` was trained with.

    Args:
        source: a checkpoint.
        vocab_size: tokens of the tokenizer at hand.
        sha256: of its files (``tokenizer_sha256``), or None if it has none.
    """
    saved = source.args.get("tokenizer_sha256")
    counts = (source.arch.vocab_size, source.arch.vocab_size + source.tokens_without_row)
    if vocab_size not in counts:
        raise UserError(
            f"{source.folder} was trained with {source.arch.vocab_size} tokens, the tokenizer has "
            f"{vocab_size}: give the checkpoint's own --tokenizer-model.",
            CHECKPOINT,
        )
    if saved and sha256 and saved != sha256:
        raise UserError(
            f"{source.folder} was trained with another tokenizer of {vocab_size} tokens (SHA-256 "
            f"{saved[:12]}, given {sha256[:12]}): give the checkpoint's own --tokenizer-model.",
            CHECKPOINT,
        )


def padded_alike(model: Arch, other: Arch) -> Arch:
    """Return ``model`` with the vocabulary padded as ``other``'s; they share a tokenizer.

    Tensor-parallel ranks then hold the same tokens of both. Megatron-LM pads to a multiple of its
    own number of ranks, so two checkpoints of one family may differ.
    """
    return replace(model, padded_vocab_size=other.padded_vocab_size)


def check_comparable(student: Arch, teacher: Arch) -> None:
    """Refuse two models of different kinds."""
    if student.is_bert != teacher.is_bert:
        names = ["a BertModel" if arch.is_bert else "a GPTModel" for arch in (teacher, student)]
        raise UserError(f"the teacher is {names[0]} and the student {names[1]}.", CHECKPOINT)
