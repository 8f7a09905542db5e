"""Datasets against their documents, batches against the serial order, every kind of bad data."""

import multiprocessing
import os
import re
import struct
import subprocess
import time
from dataclasses import replace

import numpy
import pytest
import sentencepiece
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_ext.cli.megatron_flags import TrainData
from megatron_ext.data.data_check import parse_split
from megatron_ext.data.datasets import (
    batches,
    build_datasets,
    build_tokenizer,
    check_data,
    shard_for_context_parallel,
)
from megatron_ext.data.masked_lm import special_tokens
from megatron_ext.runtime.errors import DATA, USAGE, UserError
from tests.ranks import run_ranks

VOCAB = 1001  # of NullTokenizer; eod is 1000
SEQ = 7


def flags(**typed):
    return TrainData(
        **{"tokenizer_type": "NullTokenizer", "vocab_size": VOCAB, "num_workers": 0} | typed
    )


def write(prefix, documents, dtype=numpy.uint16):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def documents(first, count=40, seed=0):
    """Return documents of 5 to 30 tokens within [first, first + 400)."""
    rng = numpy.random.default_rng(seed)
    return [rng.integers(first, first + 400, size=rng.integers(5, 31)) for _ in range(count)]


def build(data, num_samples=(30, 0, 0), seed=5):
    tokenizer = build_tokenizer(data)
    return build_datasets(
        data, seq_length=SEQ, num_samples=num_samples, tokenizer=tokenizer, seed=seed
    )


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "a", documents(0))


# ---------------------------------------------------------------------------- datasets


def test_a_token_that_the_model_has_no_row_for(tmp_path, monkeypatch):
    """Regression: all data was compared with the tokenizer's tokens, which may be more.

    Also not where another model's run has left the indices of the same data.
    """
    for name in ("SAMPLED_DOCUMENTS", "SAMPLED_TOKENS"):
        monkeypatch.setattr(f"megatron_ext.data.data_check.{name}", 1)
    few = [numpy.full(9, 3) for _ in range(40)]
    few[25] = numpy.full(9, VOCAB - 3)
    data = flags(train_data_path=(write(tmp_path / "few", few),))
    sizes = {"seq_length": SEQ, "num_samples": (30, 0, 0), "seed": 5}
    build(data)
    with pytest.raises(UserError, match=f"document 25 has token id {VOCAB - 3}") as caught:
        build_datasets(data, tokenizer=build_tokenizer(data), vocab_size=VOCAB - 3, **sizes)
    assert caught.value.code == DATA


def test_samples_are_the_windows_of_the_shuffled_documents(corpus):
    train, valid, test = build(flags(data_path=(corpus,), split="70,30,0"), (30, 10, 10))
    assert test is None
    for dataset, mine in ((train, range(28)), (valid, range(28, 40))):
        assert set(dataset.document_index) == set(mine)
        stream = numpy.concatenate([documents(0)[i] for i in dataset.document_index])
        windows = [stream[i : i + SEQ + 1] for i in range(0, len(stream) - SEQ, SEQ)]
        samples = [dataset[i] for i in range(len(dataset))]
        for sample in samples:
            assert sample.keys() == {"tokens", "labels", "loss_mask", "position_ids"}
            assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
            assert sample["loss_mask"].tolist() == [1] * SEQ
            assert sample["position_ids"].tolist() == list(range(SEQ))
        seen = [[*sample["tokens"].tolist(), sample["labels"][-1].item()] for sample in samples]
        assert sorted(seen) == sorted(window.tolist() for window in windows)


def test_masks_follow_the_end_of_document(tmp_path):
    write(tmp_path / "a", [[1, 2, 1000, 3, 4, 5, 1000, 6]])
    data = flags(
        data_path=(str(tmp_path / "a"),),
        split="1",
        eod_mask_loss=True,
        reset_position_ids=True,
        reset_attention_mask=True,
    )
    sample = build(data, (1, 0, 0))[0][0]
    assert sample["tokens"].tolist() == [1, 2, 1000, 3, 4, 5, 1000]
    assert sample["loss_mask"].tolist() == [1, 1, 0, 1, 1, 1, 0]
    assert sample["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3]
    segment = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    seen = (segment[:, None] == segment) & torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
    assert torch.equal(sample["attention_mask"], ~seen[None])


def test_mock_data():
    train, valid, test = build(flags(mock_data=True), (3, 2, 0))
    assert len(train) >= 3
    assert len(valid) >= 2
    assert test is None
    assert train[0]["tokens"].shape == (SEQ,)


def test_per_split_paths(tmp_path):
    paths = [write(tmp_path / name, documents(first)) for name, first in (("a", 0), ("b", 500))]
    train, valid, test = build(
        flags(train_data_path=(paths[0],), valid_data_path=("1.0", paths[1])), (9, 5, 5)
    )
    assert test is None
    assert train[0]["tokens"].max() < 400
    assert valid[0]["tokens"].min() >= 500


def test_a_split_without_samples_may_be_empty(corpus):
    assert build(flags(data_path=(corpus,), split="98,1,1"))[1:] == (None, None)


def test_replaced_data_is_not_read_through_old_indices(corpus):
    data = flags(data_path=(corpus,), split="1")
    build(data)
    long = numpy.arange(500, 500 + 300)
    write(corpus, [long])  # one document instead of 40
    samples = build(data)[0]
    seen = {t for i in range(len(samples)) for t in samples[i]["tokens"].tolist()}
    assert seen <= set(long.tolist())


def test_the_cache_is_complete_and_used_again(corpus, tmp_path):
    data = flags(data_path=(corpus,), split="1", data_cache_path=str(tmp_path / "deep" / "cache"))
    first = build(data)[0]
    (folder,) = os.listdir(data.data_cache_path)
    assert re.fullmatch(r"[0-9a-f]{16}", folder)
    inside = os.path.join(data.data_cache_path, folder)
    times = {name: os.stat(os.path.join(inside, name)).st_mtime_ns for name in os.listdir(inside)}
    again = build(data)[0]
    assert times == {n: os.stat(os.path.join(inside, n)).st_mtime_ns for n in os.listdir(inside)}
    assert len(times) == 5  # three indices, what they are of, and a seal
    assert torch.equal(first[3]["tokens"], again[3]["tokens"])
    build(data, seed=6)
    assert len(os.listdir(data.data_cache_path)) == 2


def test_a_sample_does_not_depend_on_what_was_read_before(tmp_path):
    """megatron-core reuses the loss mask of the first sample, with the padding of that one."""
    model = train_sentencepiece(tmp_path / "t.model", pad_id=3)
    prefix = write(tmp_path / "a", [numpy.array([5, 3, 6, 3, 7, 8, 3, 9, 10, 11])] * 10)
    data = flags(
        data_path=(prefix,),
        split="1",
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=model,
    )
    forward, backward = build(data)[0], build(data)[0]
    masks = [forward[i]["loss_mask"] for i in range(10)]
    backward_masks = [backward[i]["loss_mask"] for i in reversed(range(10))][::-1]
    assert len({tuple(m.tolist()) for m in masks}) > 1
    assert all(map(torch.equal, masks, backward_masks))


def _blend_on_ranks(paths):
    """Return the samples' first tokens, and whether context-parallel shards equal core's."""
    data = flags(data_path=("0.25", paths[0], "0.75", paths[1]), split="1")
    train = build(data, (100, 0, 0))[0]
    batch = next(
        batches(train, micro_batch_size=2, dp_rank=0, dp_size=1, consumed_samples=0, num_workers=0)
    )
    batch = {name: x.repeat(1, 4) for name, x in batch.items()}
    world = torch.distributed.group.WORLD
    ours = shard_for_context_parallel(batch, world.rank(), world.size())
    core = get_batch_on_this_cp_rank(dict(batch), world)
    same = [torch.equal(ours[name], core[name]) for name in batch]
    return [train[i]["tokens"].tolist() for i in range(len(train))], same


def test_a_blend_is_the_same_on_both_ranks(tmp_path):
    paths = [write(tmp_path / name, documents(first)) for name, first in (("a", 0), ("b", 500))]
    (mine, same), (other, _) = run_ranks(2, _blend_on_ranks, paths)
    assert mine == other
    assert all(same)
    assert len(mine) == 100
    assert sum(tokens[0] < 400 for tokens in mine) == pytest.approx(25, abs=1)
    assert not [n for n in os.listdir(tmp_path / "cache") if "." in n]  # no scratch folder left


def _blend_without_weights(paths, num_samples):
    return len(build(flags(data_path=tuple(paths), split="1"), (num_samples, 0, 0))[0])


def test_a_blend_without_weights_is_one_epoch_by_size(tmp_path):
    paths = [
        write(tmp_path / name, documents(0, n)) for name, n in (("a", 40), ("b", 10), ("c", 5))
    ]
    assert run_ranks(1, _blend_without_weights, paths, 60) == [60]
    data = flags(data_path=tuple(paths), split="1")
    with pytest.raises(UserError, match=r"has \d+ samples of 7 tokens, 9999 are needed"):
        check_data(data, seq_length=SEQ, num_samples=(9999, 0, 0), vocab_size=VOCAB)


def _error_of_build(path):
    try:
        build(flags(data_path=(path,)))
    except UserError as error:
        return str(error), error.code
    return None


def test_bad_data_fails_on_all_ranks(tmp_path):
    first, second = run_ranks(2, _error_of_build, str(tmp_path / "nothing"))
    assert first == second == (f"{tmp_path}/nothing.idx: no such file.", DATA)


# ---------------------------------------------------------------------------- bad data


def cut(path, size):
    with open(path, "r+b") as stream:
        stream.truncate(size)


def patch(path, offset, value):
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(value)


DAMAGE = {
    "missing idx": (lambda p: os.unlink(p + ".idx"), r"a\.idx: no such file"),
    "missing bin": (lambda p: os.unlink(p + ".bin"), r"a\.bin: no such file"),
    "empty idx": (lambda p: cut(p + ".idx", 0), r"a\.idx \(0 bytes\): not the index"),
    "magic": (lambda p: patch(p + ".idx", 0, b"MMIDIDY"), "not the index of a Megatron"),
    "version": (lambda p: patch(p + ".idx", 9, struct.pack("<Q", 2)), "version 2, dtype code 8"),
    "dtype": (lambda p: patch(p + ".idx", 17, b"\x06"), "version 1, dtype code 6"),
    "no documents": (lambda p: write(p, []), "holds no documents"),
    "short idx": (lambda p: cut(p + ".idx", 500), r"a\.idx: truncated, 500 of 842 bytes"),
    "short bin": (lambda p: cut(p + ".bin", 100), r"a\.bin: truncated, 100 of \d+ bytes"),
    "foreign ids": (lambda p: write(p, [[1, 2], [3, 1500]]), "document 1 has .* 3 to 1500.* 1001"),
    "negative ids": (lambda p: write(p, [[-1, 2]] * 3, numpy.int32), "ids from -1 to 2"),
    "empty documents": (lambda p: write(p, [[]] * 9), "9 of 9 documents and 0 tokens"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_data_is_named(name, corpus):
    damage, message = DAMAGE[name]
    damage(corpus)
    with pytest.raises(UserError, match=message) as caught:
        check_data(
            flags(data_path=(corpus,), split="1"),
            seq_length=SEQ,
            num_samples=(5, 0, 0),
            vocab_size=VOCAB,
        )
    assert caught.value.code == DATA


FLAGS = {
    "no data": ({}, "no data: give --data-path"),
    "empty split": ({"data_path": ("{a}",), "split": "99,1,0"}, "valid split .* 0 of 40 documents"),
    "no training": ({"data_path": ("{a}",), "split": "0,0,100"}, "--split 0,0,100: leaves nothing"),
    "no train path": ({"valid_data_path": ("{a}",)}, "no --train-data-path"),
    "zero weight": ({"data_path": ("1", "{a}", "0", "{a}")}, "weights must be finite and > 0"),
    "negative weight": ({"data_path": ("1", "{a}", "-2", "{a}")}, "weights must be finite and > 0"),
    "nan weight": ({"data_path": ("nan", "{a}")}, "weights must be finite and > 0"),
    "odd weights": ({"data_path": ("0.3", "{a}", "{a}")}, r"0\.3\.idx: no such file; every prefix"),
    "some weights": ({"data_path": ("0.3", "{a}", "{a}", "{a}")}, r"0\.3\.idx: no such file"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_bad_data_flags(name, corpus):
    typed, message = FLAGS[name]
    typed = {
        k: tuple(x.format(a=corpus) for x in v) if k != "split" else v for k, v in typed.items()
    }
    with pytest.raises(UserError, match=message):
        check_data(flags(**typed), seq_length=SEQ, num_samples=(5, 5, 0), vocab_size=VOCAB)


def test_documents_are_counted_as_megatron_rounds_them(corpus):
    """98.5 % of 40 documents are 39: one is left for validation."""
    data = flags(data_path=(corpus,), split="98.5,1.5")
    check_data(data, seq_length=SEQ, num_samples=(5, 5, 0), vocab_size=VOCAB)
    assert set(build(data, (5, 5, 0))[1].document_index) == {39}


@pytest.mark.parametrize(
    "text", ["a,b", "", "1,,2", "99,1,0,0", "-1,2", "nan", "1e-3,1", "0,0", "9 1"]
)
def test_bad_split(text):
    with pytest.raises(UserError, match="--split"):
        parse_split(text)


@pytest.mark.parametrize(
    ("text", "shares"),
    [("969, 30, 1", [0.969, 0.03, 0.001]), ("3", [1, 0, 0]), (".5,1.5", [0.25, 0.75, 0])],
)
def test_split(text, shares):
    assert parse_split(text) == pytest.approx(shares)


def test_a_typed_suffix_is_taken_off(corpus, caplog):
    data = flags(data_path=(corpus + ".bin",), split="1")
    assert build(data)[0] is not None
    assert f"{corpus}.bin: read as prefix {corpus}" in caplog.text


def test_a_cache_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot write the index cache .*--data-cache-path"):
        build(flags(data_path=(corpus,), split="1", data_cache_path=str(tmp_path / "file")))


# ---------------------------------------------------------------------------- batches


def take(dataset, **typed):
    order = {"micro_batch_size": 3, "dp_rank": 0, "dp_size": 1, "consumed_samples": 0}
    return list(batches(dataset, **order | {"num_workers": 0} | typed))


@pytest.fixture
def dataset(corpus):
    return build(flags(data_path=(corpus,), split="1"))[0]


def test_data_parallel_ranks_see_the_serial_order(dataset):
    ranks = [take(dataset, dp_rank=rank, dp_size=2, consumed_samples=5) for rank in range(2)]
    dealt = [micro for step in zip(*ranks, strict=True) for micro in step]
    tokens = torch.cat([micro["tokens"] for micro in dealt])
    num_samples = (len(dataset) - 5) // 6 * 6
    serial = torch.stack([dataset[i]["tokens"] for i in range(5, 5 + num_samples)])
    assert torch.equal(tokens, serial)
    micro = dealt[0]
    assert {name: (x.dtype, x.shape) for name, x in micro.items()} == {
        "tokens": (torch.int64, (3, SEQ)),
        "labels": (torch.int64, (3, SEQ)),
        "loss_mask": (torch.float32, (3, SEQ)),
        "position_ids": (torch.int64, (3, SEQ)),
    }


def test_resuming_goes_on_where_it_stopped(dataset):
    whole = take(dataset)
    rest = take(dataset, consumed_samples=12)
    assert len(rest) == len(whole) - 4
    for expected, micro in zip(whole[4:], rest, strict=True):
        assert all(torch.equal(expected[name], micro[name]) for name in expected)


def test_too_little_for_a_batch_ends(dataset):
    assert take(dataset, consumed_samples=len(dataset) - 2) == []
    assert len(take(dataset, consumed_samples=len(dataset) - 3)) == 1


def test_workers_change_nothing_and_no_generator_moves(dataset):
    before = torch.get_rng_state()
    serial, parallel = take(dataset), take(dataset, num_workers=2)
    assert torch.equal(before, torch.get_rng_state())
    for expected, micro in zip(serial, parallel, strict=True):
        assert all(torch.equal(expected[name], micro[name]) for name in expected)


class _Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        time.sleep(0.02)
        return {"tokens": torch.tensor([index])}


def test_workers_outlive_a_stop_signal_to_the_whole_job():
    others = set(multiprocessing.active_children())
    stream = batches(
        _Slow(), micro_batch_size=1, dp_rank=0, dp_size=1, consumed_samples=0, num_workers=1
    )
    seen = [next(stream)["tokens"].item()]
    (worker,) = set(multiprocessing.active_children()) - others
    # Sent by another process, as by a launcher.
    subprocess.run(["sh", "-c", f"kill -TERM {worker.pid}; kill -INT {worker.pid}"], check=True)
    seen += [next(stream)["tokens"].item() for _ in range(20)]
    assert seen == list(range(21))
    worker.terminate()  # by the parent
    worker.join(5)
    assert worker.exitcode == 0


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_context_parallel_shards_make_up_the_whole(cp_size):
    length = 12
    batch = {
        "tokens": torch.arange(2 * length).view(2, length),
        "attention_mask": torch.arange(2 * length * length).view(2, 1, length, length),
    }
    shards = [shard_for_context_parallel(batch, rank, cp_size) for rank in range(cp_size)]
    chunk = length // (2 * cp_size)
    for name, dim in (("tokens", 1), ("attention_mask", 2)):
        front = [shard[name].narrow(dim, 0, chunk) for shard in shards]
        back = [shard[name].narrow(dim, chunk, chunk) for shard in reversed(shards)]
        assert torch.equal(torch.cat(front + back, dim), batch[name])


# ---------------------------------------------------------------------------- tokenizers


def train_sentencepiece(path, **typed):
    with open(path, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words to make pieces of"] * 20),
            model_writer=model,
            vocab_size=320,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
            **typed,
        )
    return str(path)


def test_null_tokenizer():
    tokenizer = build_tokenizer(flags())
    assert (tokenizer.vocab_size, tokenizer.eod) == (VOCAB, 1000)
    assert tokenizer.detokenize(tokenizer.tokenize("3 1 4")) == "3 1 4"


@pytest.mark.parametrize(
    "kind", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"]
)
def test_sentencepiece(kind, tmp_path):
    model = train_sentencepiece(tmp_path / "t.model")
    tokenizer = build_tokenizer(flags(tokenizer_type=kind, tokenizer_model=model))
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert (tokenizer.vocab_size, tokenizer.eod) == (processor.vocab_size(), 2)
    assert tokenizer.tokenize("make words") == processor.encode("make words")
    assert tokenizer.detokenize(tokenizer.tokenize("make words")) == "make words"
    with pytest.raises(UserError, match="has no cls token"):
        special_tokens(tokenizer, tokenizer.vocab_size)


def test_bad_tokenizers(tmp_path):
    (tmp_path / "garbage").write_text("x" * 99)
    no_eos = train_sentencepiece(tmp_path / "t.model", eos_id=-1)
    piece = flags(tokenizer_type="SentencePieceTokenizer")
    cases = [
        (replace(piece, tokenizer_type="Unigram"), "--tokenizer-type Unigram: choose", USAGE),
        (replace(piece, tokenizer_type=None), "--tokenizer-type None: choose", USAGE),
        (piece, "SentencePieceTokenizer needs --tokenizer-model", USAGE),
        (replace(piece, tokenizer_model=str(tmp_path / "none")), "/none: not a Sentence", DATA),
        (replace(piece, tokenizer_model=str(tmp_path / "garbage")), "/garbage: not a", DATA),
        (replace(piece, tokenizer_model=no_eos), "no end-of-sentence token", DATA),
        (
            replace(piece, tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path)),
            "not a HuggingFaceTokenizer",
            DATA,
        ),
    ]
    for data, message, code in cases:
        with pytest.raises(UserError, match=message) as caught:
            build_tokenizer(data)
        assert caught.value.code == code
        assert "\n" not in str(caught.value)
