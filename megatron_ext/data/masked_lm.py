"""Samples of a masked language model: a view of the windows that a GPT model would read.

megatron-core's own BERT data set wants documents cut into sentences, for the next-sentence head
that is not trained here. Windows of running text, documents one behind the other, need no other
files than GPT's and keep its blends, splits, caches and order (RoBERTa's full sentences).

A sample of s positions is [CLS] text [SEP], then padding where text is missing. 15 % of its tokens
that are not special are to be predicted: 80 % of these are read as [MASK], 10 % as a random token,
10 % as they are (BERT's figures). The choice follows from the seed and the sample's number alone,
so that no layout, no worker and no interruption changes it, and an epoch masks others than the one
before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_ext.runtime.errors import DATA, UserError

MASK_PROB = 0.15
FRAME = 2
"""Positions of a sample that are no text: [CLS] and [SEP]."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of a tokenizer that masking needs."""

    cls: int
    sep: int
    mask: int
    pad: int
    eod: int
    vocab_size: int


def special_tokens(tokenizer: Any, vocab_size: int) -> SpecialTokens:
    """Return the special tokens of ``tokenizer``, as of ``datasets.build_tokenizer``.

    ``vocab_size``: tokens of the model, from which random ones are drawn.

    Raises:
        UserError: it has no [CLS], [SEP] or [MASK].
    """
    ids = {name: _id_of(tokenizer, name) for name in ("cls", "sep", "mask")}
    missing = [name for name, number in ids.items() if number is None]
    if missing:
        raise UserError(
            f"the tokenizer has no {missing[0]} token, which a BertModel's samples need: give "
            "--tokenizer-type HuggingFaceTokenizer and --tokenizer-model the folder of a BERT "
            "tokenizer.",
            DATA,
        )
    pad = _id_of(tokenizer, "pad") or 0
    return SpecialTokens(**ids, pad=pad, eod=tokenizer.eod, vocab_size=vocab_size)


def _id_of(tokenizer: Any, name: str) -> int | None:
    try:
        number = getattr(tokenizer, name)
    except (AttributeError, NameError):  # the second from megatron-core's SentencePieceTokenizer
        return None
    return None if number is None or number < 0 else number


class MaskedTokens(Dataset):
    """Windows with some tokens hidden, [CLS] before and [SEP] behind them."""

    def __init__(self, windows: Dataset, special: SpecialTokens, seed: int):
        """Take over the order of ``windows``.

        Args:
            windows: samples of a GPT model, of s - FRAME tokens; where their loss mask is 0 is no
                text, at the end of a sample.
            special: of the tokenizer.
            seed: of what is masked.
        """
        self.windows, self.special, self.seed = windows, special, seed

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a sample of s positions.

        tokens, labels (what stands at each position), position_ids [s] int64; loss_mask [s]
        float32, 1 where a token is to be predicted; padding_mask [s] float32, 1 where a token is;
        attention_mask [1, 1, s] bool, true where none is.
        """
        window: Mapping[str, Tensor] = self.windows[int(index)]
        length, special = len(window["tokens"]) + FRAME, self.special
        text = window["tokens"][: int(window["loss_mask"].sum())].numpy()
        labels = numpy.full(length, special.pad)
        labels[: len(text) + FRAME] = [special.cls, *text, special.sep]
        tokens, is_hidden = self._hide(
            labels, len(text), numpy.random.default_rng([self.seed, index])
        )
        is_token = numpy.arange(length) < len(text) + FRAME
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.arange(length),
            "loss_mask": torch.from_numpy(is_hidden).float(),
            "padding_mask": torch.from_numpy(is_token).float(),
            "attention_mask": torch.from_numpy(~is_token)[None, None],
        }

    def _hide(
        self, labels: numpy.ndarray, count: int, rng: numpy.random.Generator
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Return what is read instead of ``labels``, and where that is to be predicted, bool."""
        special = self.special
        never = [special.cls, special.sep, special.mask, special.pad, special.eod]
        places = 1 + numpy.flatnonzero(~numpy.isin(labels[1 : 1 + count], never))
        number = max(1, round(MASK_PROB * len(places))) if len(places) else 0
        chosen = rng.choice(places, number, replace=False)
        how, tokens = rng.random(number), labels.copy()
        tokens[chosen[how < 0.8]] = special.mask
        random = chosen[(how >= 0.8) & (how < 0.9)]
        tokens[random] = rng.integers(special.vocab_size, size=len(random))
        is_hidden = numpy.zeros(len(labels), bool)
        is_hidden[chosen] = True
        return tokens, is_hidden
