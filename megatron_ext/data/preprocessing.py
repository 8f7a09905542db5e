"""The run of tools/preprocess_data.py: files of text in, a pair of .bin and .idx per key out.

``flags`` are that program's.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tqdm import tqdm

from megatron_ext.data.datasets import build_tokenizer
from megatron_ext.runtime.errors import DATA, UserError
from megatron_ext.runtime.files import give_lock_back, lock_beside, take_lock
from megatron_ext.runtime.texts import parse_json

CHUNK_BYTES = 1 << 20


PR_SET_PDEATHSIG = 1  # of Linux' sys/prctl.h


@dataclass(frozen=True)
class Chunk:
    """Documents of one file, in order, as bytes."""

    path: str
    first_line: int
    """Line number of the first document, or 0: the whole file is one document."""
    documents: list[bytes]


# The tokens of a chunk: per document, the ids [n] of each key.
Encoded = list[list[numpy.ndarray]]


def preprocess(flags: Any, paths: Sequence[str]) -> None:
    """Tokenize the files ``paths`` and print what was written."""
    files = flags.files
    # Each worker is one thread; Hugging Face warns about its own threads after a fork otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = build_tokenizer(flags.tokenizer)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    encode = partial(encode_chunk, tokenizer, files.json_keys, files.append_eod, dtype)

    start, progress = time.monotonic(), Progress(paths, files.log_interval)
    outputs = open_outputs(files.output_prefix, files.json_keys, dtype)
    with ending_at_sigterm(), outputs as builders:
        for chunk, encoded in encode_in_order(encode, read_chunks(paths), files.workers):
            for document in encoded:
                for builder, ids in zip(builders.values(), document, strict=True):
                    if len(ids):
                        builder.add_document(ids, [len(ids)])
            progress.update(chunk)
        progress.close()
        for name, builder in builders.items():
            if not builder.sequence_lengths:
                raise UserError(f"{name}: no text in {' '.join(files.input)}.", DATA)
    seconds = time.monotonic() - start
    for name, builder in builders.items():
        tokens = sum(builder.sequence_lengths)
        print(
            f"{name}: {len(builder.sequence_lengths):,} documents, {tokens:,} tokens "
            f"({dtype.__name__}), {tokens / seconds:,.0f} tokens/s"
        )


def read_chunks(paths: Sequence[str]) -> Iterator[Chunk]:
    """Yield the input in chunks of about ``CHUNK_BYTES``, in order."""
    for path in paths:
        with open(path, "rb") as stream:
            if path.endswith(".txt"):
                yield Chunk(path, 0, [stream.read()])
                continue
            line = 1
            while lines := stream.readlines(CHUNK_BYTES):
                yield Chunk(path, line, lines)
                line += len(lines)


def encode_chunk(
    tokenizer: Any, keys: Sequence[str], append_eod: bool, dtype: type, chunk: Chunk
) -> Encoded:
    """Return the token ids of a chunk; a document without text has none, and no eod.

    Raises:
        UserError: bad UTF-8, bad JSON, missing key, or text that the tokenizer refuses; with the
            file and the line.
    """
    encoded = []
    for number, raw in enumerate(chunk.documents):
        where = f"{chunk.path}:{chunk.first_line + number}" if chunk.first_line else chunk.path
        try:
            text = raw.decode("utf-8-sig")
            if chunk.first_line and not text.strip():
                continue
            texts = _texts_of_line(where, text, keys) if chunk.first_line else [text] * len(keys)
            documents = [tokenizer.tokenize(text) if text else [] for text in texts]
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 ({error}).", DATA) from error
        except (ValueError, TypeError, OverflowError) as error:  # a lone surrogate is a TypeError
            raise UserError(f"{where}: the tokenizer refuses it ({error}).", DATA) from error
        eod = [tokenizer.eod] if append_eod else []
        encoded.append([numpy.array(ids + eod if ids else [], dtype) for ids in documents])
    return encoded


def _texts_of_line(where: str, line: str, keys: Sequence[str]) -> list[str]:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: not a JSON object on one line ({error}).", DATA) from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}, not an object.", DATA)
    for key in keys:
        if not isinstance(record.get(key), str):
            has = ", ".join(record) or "nothing"
            raise UserError(f"{where}: no text under {key!r} (--json-keys); it has {has}.", DATA)
    return [record[key] for key in keys]


def encode_in_order(
    encode: Callable[[Chunk], Encoded], chunks: Iterator[Chunk], workers: int
) -> Iterator[tuple[Chunk, Encoded]]:
    """Yield each chunk with its tokens, in order; ``workers`` > 1 processes work ahead."""
    if workers == 1:
        yield from ((chunk, encode(chunk)) for chunk in chunks)
        return
    # Forked, so that the tokenizer is built once. An executor, because a pool waits for ever for a
    # worker that was killed.
    fork = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(workers, fork, _start_worker, (encode,))
    ahead: deque = deque()
    try:
        for chunk in chunks:
            ahead.append((chunk, executor.submit(_work, chunk)))
            if len(ahead) > 4 * workers:  # bounds memory: reading is faster than tokenizing
                chunk, future = ahead.popleft()
                yield chunk, future.result()
        for chunk, future in ahead:
            yield chunk, future.result()
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker(encode: Callable[[Chunk], Encoded]) -> None:
    global _encode
    _encode = encode
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A worker whose parent was killed would wait for work for ever.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _work(chunk: Chunk) -> Encoded:
    return _encode(chunk)


@contextmanager
def ending_at_sigterm() -> Iterator[None]:
    """Have SIGTERM end the block as Ctrl-C does: workers and unfinished files go."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def open_outputs(
    prefix: str, keys: Sequence[str], dtype: type
) -> Iterator[dict[str, IndexedDatasetBuilder]]:
    """Give one builder per key, by its path; publish them on success, leave nothing on failure."""
    scratch = f".tmp-{os.getpid()}"
    paths = [f"{prefix}_{key}_document" for key in keys]
    builders: dict[str, IndexedDatasetBuilder] = {}
    try:
        os.makedirs(os.path.dirname(prefix) or ".", exist_ok=True)
        for path in paths:
            builders[path] = IndexedDatasetBuilder(path + ".bin" + scratch, dtype)
            take_lock(lock_beside(path), f"--output-prefix {prefix}: {path}")
        yield builders
        for path, builder in builders.items():
            builder.finalize(path + ".idx" + scratch)
        for path in paths:
            # First, so that a kill in between leaves no index of other data.
            Path(path + ".idx").unlink(missing_ok=True)
            os.replace(path + ".bin" + scratch, path + ".bin")
            os.replace(path + ".idx" + scratch, path + ".idx")
    except OSError as error:
        raise UserError(f"--output-prefix {prefix}: cannot write: {error}.", DATA) from error
    finally:
        for path, builder in builders.items():
            with suppress(OSError):  # a full disk
                builder.data_file.close()
            for suffix in (".bin", ".idx"):
                with suppress(FileNotFoundError):
                    os.unlink(path + suffix + scratch)
        for path in paths:
            give_lock_back(lock_beside(path))


class Progress:
    """A bar with the remaining time on a terminal, elsewhere a line every so many documents."""

    def __init__(self, paths: Sequence[str], log_interval: int):
        total = sum(map(os.path.getsize, paths))
        self.bar = tqdm(total=total, unit="B", unit_scale=True, disable=None)
        self.log_interval = log_interval
        self.documents = self.bytes = 0
        self.total = total
        self.start = time.monotonic()

    def update(self, chunk: Chunk) -> None:
        """Count a chunk that has been written."""
        before = self.documents // self.log_interval
        self.documents += len(chunk.documents)
        size = sum(map(len, chunk.documents))
        self.bytes += size
        self.bar.update(size)
        if self.bar.disable and self.documents // self.log_interval > before:
            rate = self.bytes / (time.monotonic() - self.start)
            print(
                f"processed {self.documents:,} documents, {self.bytes / self.total:.0%} "
                f"({rate / 1e6:.1f} MB/s, {(self.total - self.bytes) / rate:.0f} s left)",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Leave the bar on the terminal as it is."""
        self.bar.close()
