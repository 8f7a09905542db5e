"""Indexed documents in their order, every token once: what an evaluation reads."""

from collections.abc import Sequence

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor
from torch.utils.data import Dataset

from megatron_ext.data.data_check import check_all_token_ids
from megatron_ext.runtime.errors import DATA, UserError


class Documents(Dataset):
    """Documents one behind the other, cut into samples of s tokens.

    Sample i of all predicts the tokens [i * s + 1, (i + 1) * s], from those before them in the
    sample. All tokens but the very first are predicted once. What is missing at the end of the last
    sample, and whole samples behind it up to ``multiple``, is padding with loss mask 0.
    """

    def __init__(
        self, prefixes: Sequence[str], seq_length: int, multiple: int, limit: int | None = None
    ):
        """Open indexed data.

        Args:
            prefixes: of .bin and .idx files.
            seq_length: s.
            multiple: the number of samples is rounded up to one of this.
            limit: samples to read at most, spread evenly over all; None for all.
        """
        self.prefixes = list(prefixes)
        self.parts = [IndexedDataset(prefix) for prefix in prefixes]
        self.lengths = numpy.concatenate([part.sequence_lengths for part in self.parts])
        self.ends = numpy.cumsum(self.lengths, dtype=numpy.int64)
        self.firsts = numpy.cumsum([0, *(len(part) for part in self.parts)])
        self.seq_length, self.multiple = seq_length, multiple
        self.all_tokens = int(self.ends[-1]) - 1
        self.num_tokens = self.all_tokens
        """Tokens that are predicted."""
        self.in_all = self.num_samples = -(-self.all_tokens // seq_length)
        if limit is not None and limit < self.in_all:
            # The last sample, which may be a short one, is not among them.
            self.num_samples, self.num_tokens = limit, limit * seq_length

    def __len__(self) -> int:
        return -(-self.num_samples // self.multiple) * self.multiple

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return tokens, labels, position_ids [s] int64 and loss_mask [s] float32."""
        found = self._read(*self._place(index))
        ids = torch.zeros(self.seq_length + 1, dtype=torch.int64)
        ids[: len(found)] = torch.from_numpy(found)
        positions = torch.arange(self.seq_length)
        return {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "position_ids": positions,
            "loss_mask": (positions < len(found) - 1).float(),
        }

    def check_token_ids(self, vocab_size: int, part: int, parts: int) -> None:
        """Raise unless every token that this part reads is in the vocabulary.

        Few samples of much data are read for it twice; the rest of the data is not.

        Args:
            vocab_size: tokens are below it.
            part: of what is read, from 0.
            parts: how many there are.

        Raises:
            UserError: naming the document.
        """
        if self.num_samples == self.in_all:
            check_all_token_ids(self.prefixes, vocab_size, part, parts)
            return
        for index in range(part, self.num_samples, parts):
            start, end = self._place(index)
            ids = self._read(start, end)
            wrong = numpy.flatnonzero((ids < 0) | (ids >= vocab_size))
            if len(wrong):
                document = int(numpy.searchsorted(self.ends, start + wrong[0], side="right"))
                source = int(numpy.searchsorted(self.firsts, document, side="right")) - 1
                raise UserError(
                    f"{self.prefixes[source]}.bin: document {document - self.firsts[source]} has "
                    f"token id {ids[wrong[0]]}, the model has {vocab_size} tokens: wrong tokenizer "
                    "for this data, or it is damaged.",
                    DATA,
                )

    def _place(self, index: int) -> tuple[int, int]:
        """Return the first token of a sample and the one behind its last label."""
        # Sources lie one behind the other: the beginning would be one of them alone.
        first = index * self.in_all // self.num_samples * self.seq_length
        return first, min(first + self.seq_length, self.all_tokens) + 1

    def _read(self, start: int, end: int) -> numpy.ndarray:
        """Return the tokens [start, end) of all documents; none if there are none."""
        pieces = [numpy.empty(0, numpy.int64)]
        document = int(numpy.searchsorted(self.ends, start, side="right"))
        while start < end:
            part = int(numpy.searchsorted(self.firsts, document, side="right")) - 1
            stop = min(end, int(self.ends[document]))
            offset = start - int(self.ends[document] - self.lengths[document])
            number = document - int(self.firsts[part])
            pieces.append(self.parts[part].get(number, offset, stop - start))
            start, document = stop, document + 1
        return numpy.concatenate(pieces).astype(numpy.int64)
