"""Tokenizers, indexed datasets, blends and batches: megatron-core's, with what it leaves out.

``data`` is a ``megatron_flags.Data`` everywhere. Shape letters: b micro-batch, s sequence length.
"""

import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from functools import partial
from multiprocessing.queues import Queue
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers import MegatronTokenizerBase
from megatron.core.tokenizers.utils import build_tokenizer as core_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron_ext.cli.flag_checks import TOKENIZER_NEEDS
from megatron_ext.cli.parser import dashed
from megatron_ext.data import index_cache
from megatron_ext.data import masked_lm as masked_view
from megatron_ext.data.data_check import (
    DEFAULT_SPLIT,
    Source,
    all_prefixes,
    check_all_token_ids,
    check_data,
    sources,
)
from megatron_ext.runtime.collective_errors import check_alike, on_all_ranks, on_first_rank
from megatron_ext.runtime.errors import DATA, USAGE, UserError
from megatron_ext.runtime.extras import need

# Types that megatron-core reads with transformers.
OF_TRANSFORMERS = ("HuggingFaceTokenizer", "GPT2BPETokenizer")


def build_tokenizer(data: Any) -> MegatronTokenizerBase:
    """Return megatron-core's tokenizer: ``vocab_size``, ``eod``, ``tokenize``, ``detokenize``.

    ``vocab_size`` counts special tokens and no padding. ``eod`` is the end-of-sentence token, the
    last id of a ``NullTokenizer``. No token is added around a text.

    Raises:
        UserError: unknown type, missing flag or package (USAGE); unreadable model or no eod (DATA).
    """
    kind = data.tokenizer_type
    if kind not in TOKENIZER_NEEDS:
        beside = "; there is no tokenizer beside the checkpoint" if kind is None else ""
        kinds = ", ".join(TOKENIZER_NEEDS)
        raise UserError(f"--tokenizer-type {kind}: choose {kinds}{beside}.", USAGE)
    needed = {dashed(name): getattr(data, name) for name in TOKENIZER_NEEDS[kind]}
    if not all(needed.values()):
        raise UserError(f"--tokenizer-type {kind} needs {' '.join(needed)}.", USAGE)
    if kind in OF_TRANSFORMERS:
        need("transformers", "hf", f"--tokenizer-type {kind}")
    typed = " ".join(f"{flag} {value}" for flag, value in needed.items())
    try:
        tokenizer = core_tokenizers.build_tokenizer(
            SimpleNamespace(
                tokenizer_type=kind,
                tokenizer_model=data.tokenizer_model,
                vocab_file=data.vocab_file,
                merge_file=data.merge_file,
                vocab_size=data.vocab_size,
                trust_remote_code=data.trust_remote_code,
                pad_vocab_size=False,
                # Megatron-LM 0.19 adds them.
                tokenizer_hf_no_include_special_tokens=True,
                # Megatron-LM's defaults.
                special_tokens=None,
                metadata_path=None,
                chat_template=None,
                tokenizer_hf_no_use_fast=False,
                tokenizer_sentencepiece_legacy=False,
                tokenizer_sentencepiece_ignore_extra_whitespaces=True,
                tiktoken_pattern=None,
                tiktoken_num_special_tokens=1000,
            )
        )
    except Exception as error:  # every library raises its own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{typed}: not a {kind}: {reason[:300]}", DATA) from error
    # Without such a token SentencePiece answers -1 and Hugging Face None.
    if tokenizer.eod is None or not 0 <= tokenizer.eod < tokenizer.vocab_size:
        raise UserError(f"{typed}: has no end-of-sentence token to end documents with.", DATA)
    return tokenizer


def build_datasets(
    data: Any,
    *,
    seq_length: int,
    num_samples: tuple[int, int, int],
    tokenizer: MegatronTokenizerBase,
    seed: int,
    vocab_size: int | None = None,
    masked: bool = False,
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """Return the train, valid and test datasets, the same on every rank.

    A collective over all ranks: three all-gathers of small objects and megatron-core's barriers.
    Global rank 0 checks the data and writes the indices, all ranks then read them. Before that each
    rank reads its part of the data: every token must be in the vocabulary. A blend needs
    torch.distributed to be initialised even for one rank.

    The indices go to ``<--data-cache-path>/<key>``, by default ``<folder of the first
    prefix>/cache/<key>``. The key covers size and time of every .bin and .idx: megatron-core's own
    covers only paths, so replaced data would be read through the indices of the old.

    Args:
        data: flags.
        seq_length: s, tokens of a sample.
        num_samples: of train, valid and test. A dataset holds at least these and up to an epoch
            more; a split without samples or with weight 0 is None.
        tokenizer: of ``build_tokenizer``.
        seed: of the order of documents and samples, and of what is masked.
        vocab_size: tokens of the model, which may have fewer than its tokenizer; None for those.
        masked: samples of a masked language model, see ``masked_lm``.

    Raises:
        UserError: what ``check_data`` finds, a cache folder that cannot be written, or data that
            some rank does not see.
    """
    if not any(num_samples):
        return None, None, None
    vocab_size = vocab_size or tokenizer.vocab_size
    if masked:
        special = masked_view.special_tokens(tokenizer, vocab_size)
        _check_maskable(data)
        seq_length -= masked_view.FRAME

    def build(cache: str | None, on_this_rank: bool = True) -> list[Dataset | None]:
        config = _dataset_config(data, used, seq_length, tokenizer, seed, cache)
        kind = MockGPTDataset if data.mock_data else GPTDataset
        builder = BlendedMegatronDatasetBuilder(kind, num_samples, lambda: on_this_rank, config)
        return builder.build()

    def prepare() -> tuple[str, str | None]:
        check_data(data, seq_length=seq_length, num_samples=num_samples, vocab_size=vocab_size)
        files = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in _files(used)]
        settings = (seq_length, seed, tokenizer.unique_identifiers, vocab_size)
        parent = data.data_cache_path or os.path.join(os.path.dirname(files[0][0]), "cache")
        return index_cache.reserve(
            parent, repr((files, used, data.split, settings, "sealed, every token in vocabulary"))
        )

    if data.mock_data:
        used = tuple(Source((), None, (0.0, 1.0), n) if n else None for n in num_samples)
        cache = None
    else:
        used = sources(data, num_samples)
        cache, scratch = on_first_rank(prepare)
        if scratch:  # what is cached was read with this vocabulary before
            check = partial(check_all_token_ids, all_prefixes(used), vocab_size)
            try:
                on_all_ranks(lambda: check(_rank(), _world_size()))
            except UserError:
                on_first_rank(lambda: shutil.rmtree(scratch, ignore_errors=True))
                raise
            build(scratch, on_this_rank=_rank() == 0)
            on_first_rank(lambda: index_cache.publish(scratch, cache))
        on_all_ranks(lambda: _check_visible([cache, *_files(used)]))
        sizes = {f"the size of {path}": os.path.getsize(path) for path in _files(used)}
        check_alike(sizes, "ranks read different data", DATA)
    datasets = build(cache)
    for dataset in filter(None, datasets):
        # The masks of the first sample that a process reads are reused for all others, with the
        # padding of that one: samples would depend on the order in which they are read.
        for part in getattr(dataset, "datasets", [dataset]):
            part.masks_and_position_ids_are_cacheable = False
    if masked:
        datasets = [
            None if dataset is None else masked_view.MaskedTokens(dataset, special, seed)
            for dataset in datasets
        ]
    return tuple(datasets)


def batches(
    dataset: Dataset,
    *,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    consumed_samples: int,
    num_workers: int,
) -> Iterator[dict[str, Tensor]]:
    """Yield this data-parallel rank's micro-batches, from ``consumed_samples`` of ``dataset`` on.

    Samples are dealt in order, b to each data-parallel rank in turn, as by Megatron-LM's
    MegatronPretrainingSampler. Ends when fewer than b * dp_size samples are left. The order
    depends on no random generator and on no worker.

    Args:
        dataset: of ``build_datasets``.
        micro_batch_size: b.
        dp_rank: of this rank, in the data-parallel group without context parallelism.
        dp_size: of that group.
        consumed_samples: already seen by all data-parallel ranks together.
        num_workers: reading processes; 0 reads in this one.

    Yields:
        CPU tensors: tokens, labels, position_ids [b, s] int64, loss_mask [b, s] float32, and
        attention_mask [b, 1, s, s] bool (True = masked) under --reset-attention-mask; of a masked
        language model padding_mask and attention_mask, see ``masked_lm``.
    """
    step = micro_batch_size * dp_size
    starts = range(consumed_samples, len(dataset) - step + 1, step)
    first = dp_rank * micro_batch_size
    loader = DataLoader(
        dataset,
        batch_sampler=(range(s + first, s + first + micro_batch_size) for s in starts),
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_begin_worker,
        pin_memory=torch.cuda.is_available(),
        # By default the loader draws from torch's generator, and a run that builds a loader more
        # (a resumed one) would drop out other units.
        generator=torch.Generator(),
    )
    # Workers are born with SIGTERM blocked, in threads too that libraries start in them at once.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        stream = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    yield from stream


def shard_for_context_parallel(
    batch: dict[str, Tensor], cp_rank: int, cp_size: int
) -> dict[str, Tensor]:
    """Return this context-parallel rank's positions of a batch: chunks r and 2 * cp_size - 1 - r.

    Of 2 * cp_size equal chunks of the sequence, one from each end, so that causal attention costs
    the same on every rank (Megatron-LM's order). [b, s] becomes [b, s / cp_size]; of attention_mask
    [b, 1, s, s] the rows are taken, [b, 1, 1, s] stays. s must be divisible by 2 * cp_size.
    """
    if cp_size == 1:
        return batch
    shard = {}
    for name, tensor in batch.items():
        dim = 2 if name == "attention_mask" else 1
        length = tensor.size(dim)
        if name == "attention_mask" and length == 1:
            shard[name] = tensor
            continue
        assert length % (2 * cp_size) == 0, f"{name}: {length} positions on {cp_size} ranks"
        chunks = tensor.chunk(2 * cp_size, dim)
        shard[name] = torch.cat([chunks[cp_rank], chunks[-1 - cp_rank]], dim)
    return shard


def _dataset_config(
    data: Any,
    used: tuple[Source | None, ...],
    seq_length: int,
    tokenizer: MegatronTokenizerBase,
    seed: int,
    cache: str | None,
) -> GPTDatasetConfig:
    blends = [(list(s.prefixes), s.weights and list(s.weights)) if s else None for s in used]
    if data.mock_data:
        where = {}
    elif data.data_path:
        where = {"blend": next(filter(None, blends)), "split": data.split or DEFAULT_SPLIT}
    else:
        where = {"blend_per_split": blends}
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        path_to_cache=cache,
        mmap_bin_files=data.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=data.reset_attention_mask,
        **where,
    )
    if config.split_matrix:  # a split that nobody asked for is not built, and may be empty
        shares = zip(config.split_matrix, used, strict=True)
        config.split_matrix = [share if source else None for share, source in shares]
    return config


def _check_maskable(data: Any) -> None:
    """Refuse what changes a GPT model's masks and has no meaning in a masked language model."""
    for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
        if getattr(data, name):
            raise UserError(f"{dashed(name)}: not for a BertModel, which sees both sides.", USAGE)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _files(used: tuple[Source | None, ...]) -> list[str]:
    return [prefix + suffix for prefix in all_prefixes(used) for suffix in (".bin", ".idx")]


def _check_visible(paths: list[str]) -> None:
    for path in paths:
        if not os.path.exists(path):
            raise UserError(
                f"{path}: rank {_rank()} on {socket.gethostname()} does not see it; data and "
                "--data-cache-path must lie on storage that all nodes share.",
                DATA,
            )


def _collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    # A blend adds the number of the dataset, which no model reads.
    names = [name for name in samples[0] if name != "dataset_id"]
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}


def _begin_worker(worker: int) -> None:
    """Prepare a process that reads data."""
    _outlive_stop_signals()
    # A batch that finds no space in /dev/shm would be dropped, and the run wait for it for ever.
    Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))


def _outlive_stop_signals() -> None:
    """Let only the parent end this worker process.

    Launchers signal all processes of a job, and the run needs batches until it has saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def obey_parent() -> None:
        # Ignoring SIGTERM altogether would hang a parent that exits without using up its batches.
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            continue
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()
