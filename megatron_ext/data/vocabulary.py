"""Number of tokens of a tokenizer, for programs that turn no text into tokens."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_ext.runtime import heavy
from megatron_ext.runtime.errors import DATA, UserError

SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")


def vocab_size(data: Any) -> int:
    """Return what ``data.build_tokenizer(data).vocab_size`` is.

    Counted without megatron-core, whose import takes seconds, where the count is simple.

    Raises:
        UserError: as ``data.build_tokenizer``.
    """
    check_tokenizer_file(data)
    count = _simple_count(data)
    if count is not None:
        return count
    with heavy.imports():
        from megatron_ext.data.datasets import build_tokenizer
    return build_tokenizer(data).vocab_size


def absent_files(data: Any) -> list[str]:
    """Return the tokenizer's files that are not there."""
    files = (data.tokenizer_model, data.vocab_file, data.merge_file)
    return [name for name in files if name and not Path(name).exists()]


def check_tokenizer_file(data: Any) -> None:
    """Refuse a SentencePiece model that is not there, as ``data.build_tokenizer`` does."""
    kind, path = data.tokenizer_type, data.tokenizer_model
    if kind in SENTENCEPIECE and path and not Path(path).exists():
        # The words of megatron-core.
        raise UserError(
            f"--tokenizer-model {path}: not a {kind}: tokenizer_path: {path} is invalid", DATA
        )


def _simple_count(data: Any) -> int | None:
    """Return the count; None of other tokenizers, and of those that ``build_tokenizer`` refuses."""
    if data.tokenizer_type == "NullTokenizer" and data.vocab_size:
        return data.vocab_size
    if data.tokenizer_type in SENTENCEPIECE and Path(data.tokenizer_model or "").is_file():
        with suppress(Exception):  # not installed, no model: build_tokenizer says so
            from sentencepiece import SentencePieceProcessor

            model = SentencePieceProcessor()
            model.Load(data.tokenizer_model)
            return model.get_piece_size() if model.eos_id() >= 0 else None
    return None
