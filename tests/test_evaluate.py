"""Evaluation against a naive loop over all tokens, under every layout, and what is refused."""

import json
import math
import shlex
import shutil
from dataclasses import replace

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.data.documents import Documents
from megatron_ext.inference import evaluation
from megatron_ext.runtime.errors import CHECKPOINT, DATA, USAGE
from tests.models import LLAMA
from tests.programs import (
    LAYOUTS,
    fail,
    read_model,
    run_program,
    succeed,
    write_corpus,
    write_model,
)
from tests.ranks import run_ranks

TEACHER = replace(LLAMA, hidden_size=32)
STUDENT = replace(LLAMA, num_layers=3, padded_vocab_size=112)
SEQ_LENGTH, VOCAB = 16, LLAMA.vocab_size


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a folder with the models teacher and student and the data corpus.bin, more.bin."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_model(str(folder / "teacher"), TEACHER)
    write_model(str(folder / "student"), STUDENT)
    write_corpus(folder / "corpus", VOCAB)
    write_corpus(folder / "more", VOCAB)
    return folder


def arguments(root, **changes):
    flags = {
        "load": root / "student",
        "teacher-load": root / "teacher",
        "data-path": root / "corpus",
        "seq-length": SEQ_LENGTH,
        "micro-batch-size": 4,
        "tokenizer-type": "NullTokenizer",
        "vocab-size": VOCAB,
        "num-workers": 0,
    }
    typed = {name.replace("_", "-"): value for name, value in changes.items()}
    flags = {name: value for name, value in (flags | typed).items() if value is not None}
    return shlex.split(" ".join(f"--{name} {value}" for name, value in flags.items()))


def all_tokens(root, *names):
    parts = [IndexedDataset(str(root / name)) for name in names]
    return [int(token) for part in parts for document in part for token in document]


def naive(root, load, tokens):
    """Return float64 log-probabilities [n - 1, v] of all tokens but the first."""
    model, rows = read_model(str(root / load)), []
    with torch.no_grad():
        for first in range(0, len(tokens) - 1, SEQ_LENGTH):
            ids = torch.tensor([tokens[first : first + SEQ_LENGTH][: len(tokens) - 1 - first]])
            logits = model(ids, torch.arange(ids.shape[1])[None], None)[:, 0, :VOCAB]
            rows.append(logits.double().log_softmax(-1))
    return torch.cat(rows)


@pytest.fixture(scope="module")
def expected(root):
    tokens = all_tokens(root, "corpus")
    (teacher,), (student,) = (run_ranks(1, naive, root, n, tokens) for n in ("teacher", "student"))
    labels = torch.tensor(tokens[1:]).unsqueeze(1)
    lm, other = (-x.gather(1, labels).mean().item() for x in (student, teacher))
    return {
        "tokens": len(tokens) - 1,
        "lm loss": lm,
        "perplexity": math.exp(lm),
        "teacher lm loss": other,
        "teacher perplexity": math.exp(other),
        "kl(teacher || student)": (teacher.exp() * (teacher - student)).sum(-1).mean().item(),
        "top-1 agreement": (teacher.argmax(-1) == student.argmax(-1)).double().mean().item(),
    }


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "VPP" not in name])
def test_figures_are_the_naive_ones_under_every_layout(root, tmp_path, expected, layout):
    ranks, flags = LAYOUTS[layout]
    path = tmp_path / "figures.json"
    succeed("tools.evaluate", [*arguments(root, json=path), *flags.split()], ranks)
    found = json.loads(path.read_text())
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=2e-6)
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_alone_and_a_model_beside_itself(root):
    (alone,) = succeed("tools.evaluate", arguments(root, teacher_load=None))
    (twice,) = succeed("tools.evaluate", arguments(root, teacher_load=root / "student"))
    line = next(line for line in alone.stdout.splitlines() if line.startswith("lm loss"))
    assert line in twice.stdout
    assert line.replace("lm loss", "teacher lm loss").split() in [
        each.split() for each in twice.stdout.splitlines()
    ]
    words = {each.rsplit(maxsplit=1)[0]: each.split()[-1] for each in twice.stdout.splitlines()}
    assert float(words["kl(teacher || student)"]) == 0
    assert float(words["top-1 agreement"]) == 1
    assert "kl" not in alone.stdout


@pytest.mark.parametrize(("multiple", "limit"), [(1, None), (5, None), (4, 3), (1, 10**6)])
@pytest.mark.parametrize("seq_length", [7, 64, 4096])
def test_documents_hold_every_token_once(root, seq_length, multiple, limit):
    tokens = all_tokens(root, "corpus", "more")
    prefixes = [str(root / name) for name in ("corpus", "more")]
    documents = Documents(prefixes, seq_length, multiple, limit)
    assert len(documents) % multiple == 0
    inputs, labels = [], []
    for sample in map(documents.__getitem__, range(len(documents))):
        real = sample["loss_mask"].bool()
        assert not sample["labels"][~real].any()
        inputs += sample["tokens"][real].tolist()
        labels += sample["labels"][real].tolist()
    pieces = [
        (tokens[i : i + seq_length + 1][:-1], tokens[i + 1 : i + seq_length + 1])
        for i in range(0, len(tokens) - 1, seq_length)
    ]
    if limit is not None and limit < len(pieces):
        pieces = [pieces[i * len(pieces) // limit] for i in range(limit)]
    assert inputs == [token for piece, _ in pieces for token in piece]
    assert labels == [token for _, piece in pieces for token in piece]
    assert documents.num_tokens == len(inputs)


def test_few_samples_are_a_spread_of_the_data(root):
    """Regression: they were the beginning, one source of a blend."""
    prefixes = [str(root / name) for name in ("corpus", "more")]
    whole = Documents(prefixes, 7, 1)
    few = Documents(prefixes, 7, 1, limit=4)
    found = [few[i]["tokens"].tolist() for i in range(4)]
    pieces = [whole[i]["tokens"].tolist() for i in range(len(whole))]
    places = [pieces.index(piece) for piece in found]
    assert places[0] == 0
    assert places[-1] > len(whole) * 0.6


def outside(root, token, name):
    """Return a copy of the corpus with an id that the model lacks at ``token``."""
    for suffix in (".bin", ".idx"):
        shutil.copy(root / f"corpus{suffix}", root / f"{name}{suffix}")
    with (root / f"{name}.bin").open("r+b") as file:
        file.seek(2 * token)
        file.write(VOCAB.to_bytes(2, "little"))
    return root / name


def look_at_no_document():
    evaluation.check_token_ids = lambda *_: None


@pytest.mark.parametrize("layout", ["TP1", "TP2", "DP2"])
def test_ids_of_what_is_read_are_in_the_vocabulary(root, layout, monkeypatch):
    """Few samples of much data are looked at, and all of them; the rest of it is not."""
    world_size, flags = LAYOUTS[layout]
    total = len(all_tokens(root, "corpus"))
    in_all = -(-(total - 1) // SEQ_LENGTH)
    chosen = in_all // 2 * SEQ_LENGTH  # of two samples, the second begins there
    for name, token, limit, is_read in (
        ("label", SEQ_LENGTH, 2, True),
        ("behind", SEQ_LENGTH + 1, 2, False),
        ("second", chosen + 3, 2, True),
        ("unlimited", SEQ_LENGTH + 1, None, True),
    ):
        data = outside(root, token, f"{name}-{layout}")
        changes = {"data_path": data, "eval_samples": limit, "micro_batch_size": 1}
        argv = [*arguments(root, **changes), *flags.split()]
        if not is_read:
            outcomes = run_program("tools.evaluate", argv, world_size, look_at_no_document)
            assert [o.code for o in outcomes] == [0] * world_size, outcomes[0].stderr
            continue
        code, line = fail("tools.evaluate", argv, world_size, look_at_no_document)
        assert code == DATA, line
        dataset = IndexedDataset(str(data))  # what it maps goes with it
        ends = numpy.cumsum(dataset.sequence_lengths)
        document = numpy.searchsorted(ends, token, side="right")
        assert f"{data}.bin: document {document} has token id {VOCAB}" in line


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"data_path": "/nowhere/data"}, DATA, "/nowhere/data.idx: no such file"),
        ({"load": "/nowhere"}, CHECKPOINT, "/nowhere"),
        ({"vocab_size": 51}, CHECKPOINT, "was trained with 100 tokens, the tokenizer has 51"),
        ({"seq_length": 64}, USAGE, "--seq-length 64 is longer than"),
        ({"tensor_model_parallel_size": 2}, USAGE, "1 ranks are not a multiple of"),
        ({"json": "/proc/nowhere/x"}, None, "/proc/nowhere/x cannot be written"),
    ],
)
def test_bad_input_is_one_line(root, changes, code, message):
    found, line = fail("tools.evaluate", arguments(root, **changes))
    assert message in line
    assert code in (None, found)
