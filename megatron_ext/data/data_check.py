"""The sources of samples, read before the first step of a run, and what is wrong with them.

megatron-core hangs on a split without tokens, takes every number it finds in ``--split``, and meets
a broken file at some later batch. ``check_data`` says so at once, with the file and the numbers.
"""

import itertools
import logging
import math
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from megatron_ext.runtime.errors import DATA, USAGE, UserError, is_first_rank

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
DEFAULT_SPLIT = "969, 30, 1"  # Megatron-LM's

# Of an .idx file: magic, version, dtype code, number of sequences, number of documents + 1.
INDEX_HEADER = struct.Struct("<9sQBQQ")
INTEGERS = {
    1: numpy.uint8,
    2: numpy.int8,
    3: numpy.int16,
    4: numpy.int32,
    5: numpy.int64,
    8: numpy.uint16,
}
# megatron-core's index of them takes 8 bytes and more each, on every rank.
MOST_SAMPLES = 10**10
# Read from every prefix to compare token ids with the vocabulary.
SCANNED_TOKENS = 2**22
SAMPLED_DOCUMENTS, SAMPLED_TOKENS = 64, 65536


@dataclass(frozen=True)
class Source:
    """Sources of the samples of one split."""

    prefixes: tuple[str, ...]
    """Paths without .bin and .idx."""
    weights: tuple[float, ...] | None
    """One per prefix; None for one prefix, and for one epoch of each of several."""
    share: tuple[float, float]
    """First and last document, as fractions of each prefix."""
    num_samples: int


def sources(
    data: Any, num_samples: tuple[int, int, int]
) -> tuple[Source | None, Source | None, Source | None]:
    """Return where train, valid and test come from; None without samples or with weight 0.

    Raises:
        UserError: ``data``, a ``megatron_flags.Data``, names no data, a bad split or bad weights.
    """
    per_split = (data.train_data_path, data.valid_data_path, data.test_data_path)
    if data.data_path:
        blends = [_blend("--data-path", data.data_path)] * 3
        shares = _shares(parse_split(data.split or DEFAULT_SPLIT))
    elif any(per_split):
        flags = [f"--{name}-data-path" for name in SPLITS]
        blends = [_blend(*each) if each[1] else None for each in zip(flags, per_split, strict=True)]
        shares = [(0.0, 1.0)] * 3
    else:
        raise UserError("no data: give --data-path, --train-data-path or --mock-data.", USAGE)
    found = tuple(
        Source(*blend, share, samples) if blend and share and samples else None
        for blend, share, samples in zip(blends, shares, num_samples, strict=True)
    )
    if num_samples[0] and found[0] is None:
        cause = f"--split {data.split}" if data.data_path else "no --train-data-path"
        raise UserError(f"{cause}: leaves nothing to train on.", DATA)
    return found


def parse_split(text: str) -> list[float]:
    """Return the shares of train, valid and test, summing to 1, from a ``--split`` like "99,1,0".

    Raises:
        UserError: anything but one to three numbers >= 0 with a positive sum.
    """
    parts = [part.strip() for part in text.split(",")]
    # What megatron-core's own reader understands; it would take 1e-3 for the numbers 1 and 3.
    numbers = [float(part) for part in parts if re.fullmatch(r"\d+\.?\d*|\.\d+", part)]
    if len(numbers) != len(parts) or len(parts) > 3 or sum(numbers) == 0:
        raise UserError(
            f"--split {text}: needs one to three numbers >= 0, not all 0, e.g. 99,1,0.", DATA
        )
    total = sum(numbers)
    return [number / total for number in numbers] + [0.0] * (3 - len(numbers))


def check_data(
    data: Any, *, seq_length: int, num_samples: tuple[int, int, int], vocab_size: int
) -> None:
    """Raise for what would break or hang a run later. Not a collective.

    Reads the index and some documents of every prefix that a requested split uses.

    Args:
        data: a ``megatron_flags.Data``.
        seq_length: tokens of a sample.
        num_samples: requested of train, valid and test.
        vocab_size: tokens of the model, without padding.

    Raises:
        UserError: see the messages; the code is DATA.
    """
    if data.mock_data:
        return
    if max(num_samples) > MOST_SAMPLES:
        raise UserError(
            f"a run of {max(num_samples)} samples: the index of more than {MOST_SAMPLES} fits no "
            "memory: fewer --train-iters or a smaller --global-batch-size.",
            USAGE,
        )
    used = sources(data, num_samples)
    typed = (data.data_path, data.train_data_path, data.valid_data_path, data.test_data_path)
    for path in itertools.chain(*typed):
        if path != _prefix(path) and is_first_rank():
            logger.warning(f"{path}: read as prefix {_prefix(path)}")
    for prefix in all_prefixes(used):
        check_token_ids(prefix, vocab_size)
    for name, source in zip(SPLITS, used, strict=True):
        if source is not None:
            _check_amount(name, source, seq_length, data)


def all_prefixes(used: tuple[Source | None, ...]) -> list[str]:
    """Return every prefix once, in the order typed."""
    return list(dict.fromkeys(p for source in used if source for p in source.prefixes))


def _blend(flag: str, typed: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Return prefixes and weights of "[weight] prefix ...", as Megatron-LM reads it."""
    weights = _weights(typed)
    paths = typed if weights is None else typed[1::2]
    prefixes = tuple(_prefix(path) for path in paths)
    if weights is not None and not all(math.isfinite(w) and w > 0 for w in weights):
        raise UserError(
            f"{flag} {' '.join(typed)}: weights must be finite and > 0; leave out what has none.",
            DATA,
        )
    # One prefix is one dataset, not a blend, whatever its weight.
    return prefixes, tuple(weights) if weights and len(prefixes) > 1 else None


# The reading of megatron-core, which takes seconds to import: tests compare the two.


def _weights(typed: tuple[str, ...]) -> list[float] | None:
    """Return the weights of "weight prefix ...", or None if words are prefixes only."""
    if len(typed) % 2:
        return None
    numbers = [_number(word) for word in typed[::2]]
    if None not in numbers:
        return numbers
    assert not any(numbers[numbers.index(None) :]), f"weights of some prefixes only: {typed}"
    return None


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _shares(parts: list[float]) -> list[tuple[float, float] | None]:
    """Return where each split begins and ends, None for one without a share."""
    ends = list(itertools.accumulate(parts, initial=0))
    return [share if share[0] < share[1] else None for share in itertools.pairwise(ends)]


def _prefix(path: str) -> str:
    return path.strip().removesuffix(".bin").removesuffix(".idx")


def check_distinct(flag: str, data: Any, *, seq_length: int, num_samples: int) -> None:
    """Raise if the train split has fewer samples than that before it repeats. Not a collective.

    Args:
        flag: what asks for so many, for the message.
        data: a ``megatron_flags.Data``, checked by ``check_data``.
        seq_length: tokens of a sample.
        num_samples: how many.
    """
    if data.mock_data:
        return
    source = sources(data, (num_samples, 0, 0))[0]
    assert source is not None, "check_data lets no empty split pass"
    tokens = [_documents(prefix, source)[2] for prefix in source.prefixes]
    found = sum((n - 1) // seq_length for n in tokens)
    if found < num_samples:
        raise UserError(
            f"{flag} {num_samples}: the train split of {' '.join(source.prefixes)} has only "
            f"{found} samples of {seq_length} tokens; ask for fewer or give more data.",
            DATA,
        )


def _documents(prefix: str, source: Source) -> tuple[int, int, int]:
    """Return a prefix's documents, those in the split of ``source``, and the tokens of these."""
    _, lengths, _ = _read_index(prefix)
    # The rounding of BlendedMegatronDatasetBuilder.
    first, last = (round(fraction * len(lengths)) for fraction in source.share)
    return len(lengths), last - first, int(lengths[first:last].sum(dtype=numpy.int64))


def _check_amount(name: str, source: Source, seq_length: int, data: Any) -> None:
    """Raise if a split of a prefix has no token, or a blend fewer samples than requested."""
    samples = 0
    for prefix in source.prefixes:
        documents, in_split, tokens = _documents(prefix, source)
        if tokens == 0:  # megatron-core would repeat it for ever to get its samples
            split = f"--split {data.split or DEFAULT_SPLIT}: " if data.data_path else ""
            raise UserError(
                f"{split}the {name} split of {prefix} has {in_split} of {documents} "
                f"documents and 0 tokens; give it more data or a larger share.",
                DATA,
            )
        samples += (tokens - 1) // seq_length
    if len(source.prefixes) > 1 and source.weights is None and samples < source.num_samples:
        raise UserError(
            f"the {name} split of {' '.join(source.prefixes)} has {samples} samples of "
            f"{seq_length} tokens, {source.num_samples} are needed; put a weight before each "
            "prefix to repeat data.",
            DATA,
        )


def check_token_ids(prefix: str, vocab_size: int) -> None:
    """Raise unless the data of ``prefix`` are there and look like tokens of this vocabulary.

    Raises:
        UserError: a file is missing, truncated or of another kind, or ids are out of range.
    """
    dtype, lengths, pointers = _read_index(prefix)
    documents = numpy.linspace(0, len(lengths) - 1, min(SAMPLED_DOCUMENTS, len(lengths)))
    for document in documents.astype(int):
        count = min(int(lengths[document]), SAMPLED_TOKENS)
        ids = numpy.fromfile(prefix + ".bin", dtype, count, offset=int(pointers[document]))
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise UserError(
                f"{prefix}.bin: document {document} has token ids from {ids.min()} to {ids.max()}, "
                f"the model has {vocab_size} tokens: wrong tokenizer for this data.",
                DATA,
            )


def check_all_token_ids(prefixes: Sequence[str], vocab_size: int, part: int, parts: int) -> None:
    """Raise unless every token of this part of the data is in the vocabulary. Reads the part.

    An id that the embedding lacks is a bare IndexError at some step on one tensor-parallel rank,
    and on several of them a row of zeros, without a word.

    Args:
        prefixes: of the data.
        vocab_size: tokens are below it.
        part: of each file, from 0.
        parts: how many there are.

    Raises:
        UserError: naming the document.
    """
    for prefix in prefixes:
        dtype, _, pointers = _read_index(prefix)
        size = numpy.dtype(dtype).itemsize
        count = os.path.getsize(prefix + ".bin") // size
        stop = count * (part + 1) // parts
        for first in range(count * part // parts, stop, SCANNED_TOKENS):
            many = min(SCANNED_TOKENS, stop - first)
            ids = numpy.fromfile(prefix + ".bin", dtype, many, offset=first * size)
            wrong = numpy.flatnonzero((ids < 0) | (ids >= vocab_size))
            if len(wrong):
                place = (first + int(wrong[0])) * size
                document = int(numpy.searchsorted(pointers, place, side="right")) - 1
                raise UserError(
                    f"{prefix}.bin: document {document} has token id {ids[wrong[0]]} at token "
                    f"{(place - int(pointers[document])) // size}, the tokenizer has {vocab_size}: "
                    "wrong tokenizer for this data, or it is damaged.",
                    DATA,
                )


def check_index(prefix: str) -> None:
    """Raise ``UserError`` unless both files of ``prefix`` are there and whole."""
    _read_index(prefix)


def _read_index(prefix: str) -> tuple[type, numpy.ndarray, numpy.ndarray]:
    """Return dtype of the tokens, lengths [n] int32 and byte offsets [n] int64 of the documents."""
    idx, binary = prefix + ".idx", prefix + ".bin"
    for path in (idx, binary):
        if not os.path.isfile(path):
            is_number = re.fullmatch(r"[-+.\d]+", prefix)
            hint = "; every prefix needs a weight, or none" if is_number else ""
            raise UserError(f"{path}: no such file{hint}.", DATA)
    num_bytes = os.path.getsize(idx)
    with open(idx, "rb") as stream:
        head = stream.read(INDEX_HEADER.size)
    if len(head) < INDEX_HEADER.size or not head.startswith(b"MMIDIDX\0\0"):
        raise UserError(f"{idx} ({num_bytes} bytes): not the index of a Megatron dataset.", DATA)
    _, version, code, num_sequences, num_documents = INDEX_HEADER.unpack(head)
    if version != 1 or code not in INTEGERS:
        raise UserError(
            f"{idx}: version {version}, dtype code {code}; needs version 1 and an integer dtype "
            f"{tuple(INTEGERS)}.",
            DATA,
        )
    if num_sequences == 0:
        raise UserError(f"{idx}: holds no documents.", DATA)
    needed = INDEX_HEADER.size + 12 * num_sequences + 8 * num_documents
    if num_bytes < needed:
        raise UserError(f"{idx}: truncated, {num_bytes} of {needed} bytes.", DATA)
    lengths = numpy.memmap(idx, numpy.int32, "r", INDEX_HEADER.size, (num_sequences,))
    offset = INDEX_HEADER.size + lengths.nbytes
    pointers = numpy.memmap(idx, numpy.int64, "r", offset, (num_sequences,))
    dtype = INTEGERS[code]
    end = int(pointers[-1]) + int(lengths[-1]) * numpy.dtype(dtype).itemsize
    if os.path.getsize(binary) < end:
        raise UserError(
            f"{binary}: truncated, {os.path.getsize(binary)} of {end} bytes that {idx} names.", DATA
        )
    return dtype, lengths, pointers
