"""Text to datasets and back, bad text, and from-scratch's corpus on a small library."""

import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.data import preprocessing
from megatron_ext.data.datasets import build_tokenizer
from megatron_ext.runtime.errors import DATA, USAGE, UserError
from tools import preprocess_data

corpus = importlib.import_module("examples.from-scratch.corpus")

NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]


def run(tmp_path, inputs, *typed, tokenizer=NULL):
    output = str(tmp_path / "out" / "set")
    preprocess_data.main(
        ["--input", *map(str, inputs), "--output-prefix", output, *tokenizer, *typed]
    )
    return read(tmp_path / "out" / "set_text_document")


def read(prefix):
    dataset = IndexedDataset(str(prefix))
    assert len(dataset.document_indices) == len(dataset) + 1
    return [dataset[i].tolist() for i in range(len(dataset))]


def write_lines(path, lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


@pytest.fixture
def numbers(tmp_path):
    rng = numpy.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 99, size=n))) for n in range(1, 200)]
    return write_lines(tmp_path / "a.jsonl", [json.dumps({"text": t, "n": 1}) for t in texts])


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Run corpus.py on a library of two real packages and files that must be left out."""
    root = tmp_path_factory.mktemp("library")
    for module in (json, Path("")):
        folder = Path(os.path.dirname(json.__file__ if module is json else os.__file__))
        for path in sorted(folder.glob("*.py"))[:: 1 if module is json else 12]:
            (root / path.name).write_bytes(path.read_bytes())
    (root / "test").mkdir()
    (root / "test" / "test_x.py").write_text("x = 1\nprint(x)\n")
    (root / "table.py").write_text("'''Doc.'''\nTABLE = {\n" + "    1: -2,\n" * 50 + "}\n")
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nprint('\xe9')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
        folders = [tmp_path_factory.mktemp("corpus") for _ in range(2)]
        for folder in folders:
            corpus.main(["--output", str(folder), "--vocab-size", "512"])
    return folders


# ---------------------------------------------------------------------------- preprocess_data


def test_documents_in_order(tmp_path, numbers, capsys):
    expected = [
        [int(t) for t in json.loads(line)["text"].split()] + [99]
        for line in numbers.read_text().splitlines()
    ]
    assert run(tmp_path, [numbers], "--append-eod") == expected
    tokens = sum(map(len, expected))
    assert f"199 documents, {tokens:,} tokens (uint16)" in capsys.readouterr().out


def test_workers_do_not_change_a_byte(tmp_path, numbers, monkeypatch):
    monkeypatch.setattr(preprocessing, "CHUNK_BYTES", 500)
    found = {}
    for workers in ("1", "2"):
        run(tmp_path, [numbers, numbers], "--workers", workers)
        outputs = sorted((tmp_path / "out").iterdir())
        found[workers] = {path.name: path.read_bytes() for path in outputs}
    assert found["1"] == found["2"]
    assert len(found["1"]) == 2


def test_inputs_files_folders_patterns(tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbf1 2")
    (folder / "a.jsonl").write_bytes(b'{"text": "3"}\r\n\r\n{"text": ""}\n{"text": "4"}')
    (folder / "deep" / "c.json").write_text('{"text": "5"}\n')
    (folder / "d.md").write_text("ignored")
    assert run(tmp_path, [folder]) == [[3], [4], [1, 2], [5]]
    assert run(tmp_path, [folder / "*.txt", folder / "a.jsonl"]) == [[1, 2], [3], [4]]


def test_one_output_per_key(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ['{"x": "1", "y": "2 3"}', '{"x": "", "y": "4"}'])
    preprocess_data.main(
        [
            "--input",
            str(path),
            "--output-prefix",
            str(tmp_path / "o"),
            "--json-keys",
            "x",
            "y",
            *NULL,
        ]
    )
    assert read(tmp_path / "o_x_document") == [[1]]
    assert read(tmp_path / "o_y_document") == [[2, 3], [4]]


GOOD = '{"text": "1 2"}'
BAD = {
    "json": ([GOOD, '{"text": '], r"a\.jsonl:2: not a JSON object on one line"),
    "array": ([GOOD, GOOD, "[1]"], r"a\.jsonl:3: a JSON list, not an object"),
    "key": ([GOOD, '{"body": "1"}'], r"a\.jsonl:2: no text under 'text' .*it has body"),
    "number": (['{"text": 1}'], r"a\.jsonl:1: no text under 'text'"),
    "utf-8": ([GOOD, b'{"text": "\xff"}'], r"a\.jsonl:2: not UTF-8"),
    "text": (['{"text": "one"}'], r"a\.jsonl:1: the tokenizer refuses it"),
    "empty": (["", '{"text": ""}'], r"set_text_document: no text in"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_text_is_named_and_nothing_is_left(name, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing, "CHUNK_BYTES", 16)
    lines, message = BAD[name]
    path = write_lines(tmp_path / "a.jsonl", lines)
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path, [path], "--workers", workers)
    assert caught.value.code == DATA
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_run_leaves_the_old_output(tmp_path, numbers):
    before = run(tmp_path, [numbers])
    bad = write_lines(tmp_path / "bad.jsonl", [GOOD, "{"])
    with pytest.raises(UserError, match=r"bad\.jsonl:2"):
        run(tmp_path, [bad])
    assert read(tmp_path / "out" / "set_text_document") == before


@pytest.mark.parametrize(
    ("typed", "message", "code"),
    [
        (["--input", "x"], "missing --output-prefix --tokenizer-type", USAGE),
        (["--inputs", "x"], "did you mean --input", USAGE),
        (["--input", "/none/*", "--output-prefix", "o", *NULL], "--input /none/", DATA),
        (["--input", __file__, "--output-prefix", f"{__file__}/o", *NULL], "cannot write", DATA),
    ],
)
def test_bad_flags(typed, message, code):
    with pytest.raises(UserError, match=message) as caught:
        preprocess_data.main(typed)
    assert caught.value.code == code


# ---------------------------------------------------------------------------- corpus


def test_the_corpus_is_the_same_on_every_run(corpora):
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in corpora)
    assert first == second
    assert set(first) == {"tokenizer.model", "train.jsonl", "valid.jsonl"}


def test_the_corpus_has_code_and_topics_and_no_tables(corpora):
    parts = {
        name: [json.loads(line) for line in (corpora[0] / f"{name}.jsonl").open()]
        for name in ("train", "valid")
    }
    names = {name: {record["source"] for record in part} for name, part in parts.items()}
    every = names["train"] | names["valid"]
    assert not names["train"] & names["valid"]
    assert 0 < len(names["valid"]) < 0.2 * len(every)
    assert {"decoder.py", "latin.py", "pydoc_data/topics/while"} <= every
    assert not {"test/test_x.py", "table.py"} & every
    texts = {record["source"]: record["text"] for part in parts.values() for record in part}
    assert "é" in texts["latin.py"]


def test_the_tokenizer_gives_back_every_text(corpora, tmp_path):
    model = str(corpora[0] / "tokenizer.model")
    data = SimpleNamespace(
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=model,
        vocab_file=None,
        merge_file=None,
        vocab_size=None,
        trust_remote_code=False,
    )
    tokenizer = build_tokenizer(data)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.unk, tokenizer.bos) == (512, 2, 0, 1)
    records = [json.loads(line) for line in (corpora[0] / "valid.jsonl").open()]
    texts = [record["text"] for record in records]
    texts += [
        "",
        " ",
        "\n\n  x\t\r\n",
        "    a  b ",
        "é 漢字 🙂 </s> <0x0A>",
        Path(__file__).read_text(),
    ]
    for text in texts:
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text

    typed = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    encoded = run(tmp_path, [corpora[0] / "valid.jsonl"], "--append-eod", tokenizer=typed)
    assert [tokenizer.detokenize(ids[:-1]) for ids in encoded] == texts[: len(records)]
    assert {ids[-1] for ids in encoded} == {tokenizer.eod}
