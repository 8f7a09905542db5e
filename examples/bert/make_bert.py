"""A BERT-base with random weights as a Hugging Face folder, and a WordPiece tokenizer for it.

    python examples/bert/make_bert.py --text OUT/corpus/train.jsonl --output OUT/hf-base

The shape is that of bert-base-uncased: 109,514,298 parameters. A real one takes its place as it is.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.cli.parser import REQUIRED, flag, parse
from megatron_ext.runtime.errors import run_main
from megatron_ext.runtime.extras import need


@dataclass(frozen=True, kw_only=True)
class Make:
    """Model."""

    text: str = flag(REQUIRED, "JSON lines, whose text the tokenizer is made from")
    output: str = flag(REQUIRED, "folder to write")
    vocab_size: int = flag(30522, "rows of the embedding; the tokenizer has no more", at_least=512)
    seed: int = flag(1234, "of the weights", at_least=0)


@dataclass(frozen=True, kw_only=True)
class MakeFlags:
    """Write a random BERT-base and a tokenizer."""

    make: Make


def main(argv: Sequence[str] | None = None) -> None:
    """Write the folder and print its sizes."""
    flags = parse(MakeFlags, argv).make
    transformers = need("transformers", "hf", "BERT's folder")
    folder = Path(flags.output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(flags.text) as lines:
        texts = [json.loads(line)["text"] for line in lines]
    tokenizer = train_tokenizer(texts, flags.vocab_size)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(flags.seed)
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=flags.vocab_size))
    model.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """Return BERT's tokenizer, lower case, of ``vocab_size`` tokens or as many as texts have."""
    tokenizers = need("tokenizers", "hf", "BERT's tokenizer")
    transformers = need("transformers", "hf", "BERT's tokenizer")
    wordpiece = tokenizers.BertWordPieceTokenizer(lowercase=True)
    wordpiece.train_from_iterator(texts, vocab_size, show_progress=False)
    special = {
        f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")
    }
    return transformers.PreTrainedTokenizerFast(tokenizer_object=wordpiece._tokenizer, **special)


if __name__ == "__main__":
    run_main(main)
