"""A Hugging Face folder with a GPT-2 of the real size: random weights, a tokenizer of this text.

python examples/gpt2/model.py --corpus DIR --hf DIR
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

END = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Model:
    """Model."""

    corpus: str = flag(REQUIRED, "folder of examples/from-scratch/corpus.py")
    hf: str = flag(REQUIRED, "folder to write")
    vocab_size: int = flag(50257, "tokens; GPT-2 has 50257", at_least=300)


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Write a GPT-2 with random weights."""

    model: Model


def main(argv: Sequence[str] | None = None) -> None:
    """Write tokenizer and model."""
    options = parse(ModelFlags, argv).model
    transformers = need("transformers", "hf", "GPT-2's folder")
    lines = (Path(options.corpus) / "train.jsonl").read_text().splitlines()
    tokenizer = byte_level_bpe([json.loads(line)["text"] for line in lines], options.vocab_size)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END
    )
    fast.save_pretrained(options.hf)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=options.vocab_size)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(options.hf)
    print(f"{options.hf}: {model.num_parameters():,} parameters, {len(fast):,} tokens")


def byte_level_bpe(texts: Sequence[str], vocab_size: int) -> Any:
    """Return a tokenizer of GPT-2's kind: byte-level BPE, one special token."""
    tokenizers = need("tokenizers", "hf", "GPT-2's tokenizer")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


if __name__ == "__main__":
    run_main(main)
