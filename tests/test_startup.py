"""Programs import little before they have something to compute: modules are counted, not time.

And that what is read without torch and megatron-core is what they read.
"""

import json
import shlex
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
)
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.utils import get_blend_from_list, normalize

from megatron_ext.checkpoint import checkpoints
from megatron_ext.checkpoint.quick_read import glance
from megatron_ext.cli.megatron_flags import Data
from megatron_ext.data import data_check
from megatron_ext.data.datasets import build_tokenizer
from megatron_ext.data.vocabulary import check_tokenizer_file, vocab_size
from megatron_ext.runtime import heavy
from megatron_ext.runtime.errors import CHECKPOINT, DATA, USAGE, UserError
from tests.models import LLAMA
from tests.programs import NEW_MODEL, ROOT, data_flags, write_corpus, write_model
from tests.test_core_0_16 import EXPECTED, unpack
from tests.test_data import train_sentencepiece

HEAVY = ("torch", "megatron", "transformers", "triton", "matplotlib")
PROGRAMS = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "prune.py", ROOT / "pretrain_distill.py", *(ROOT / "tools").glob("*.py")]
    if path.name not in ("__init__.py", "container_pins.py")  # the second takes no flags
)
# Runs a program as its command does; the last line of stdout: its code, heavy modules it imported.
RUNNER = """
import json, runpy, sys
sys.argv, heavy, code = sys.argv[1:-1], json.loads(sys.argv[-1]), 0
sys.path.insert(0, "")
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as error:
    code = error.code
print("\\n" + json.dumps([code, [name for name in heavy if name in sys.modules]]))
"""
RUN = "--seq-length 16 --micro-batch-size 1 --train-iters 4 --lr 1e-3"
NULL = "--tokenizer-type NullTokenizer --vocab-size 100"
CUT = "--target-hidden-size 40 --calibration-samples 2 --seq-length 16 --micro-batch-size 1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a model of LLAMA's sizes and data."""
    folder = tmp_path_factory.mktemp("startup")
    write_model(str(folder / "teacher"), LLAMA)
    write_corpus(folder / "corpus", LLAMA.vocab_size)
    return folder


def imported(program, line):
    """Return a program's code, the heavy modules it imported, and what it said."""
    command = [sys.executable, "-c", RUNNER, program, *shlex.split(line), json.dumps(HEAVY)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    code, modules = json.loads(ended.stdout.splitlines()[-1])
    return code, modules, ended.stdout + ended.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_wrong_flags_import_no_torch(program):
    first = "import " if program.endswith("convert.py") else ""
    for line, expected in (("--help", 0), ("--no-such-flag 1", USAGE)):
        code, modules, said = imported(program, first + line)
        assert (code or 0, modules) == (expected, []), said


REFUSED = [
    ("prune.py", "--load x", USAGE),
    ("prune.py", "--load {p}/none --save {p}/new {n} --mock-data {c}", CHECKPOINT),
    ("prune.py", "--load {p}/teacher --save {p}/new {n} --data-path {p}/none {c}", DATA),
    ("prune.py", "--load {p}/teacher --save {p}/new {n} --mock-data {c}0000", USAGE),
    ("pretrain_distill.py", NEW_MODEL + "--tensor-model-parallel-size 3", USAGE),
    ("pretrain_distill.py", "{n} --mock-data {r} --load {p}/none", CHECKPOINT),
    ("pretrain_distill.py", "{n} --mock-data {r} --load {p}/teacher --teacher-load x", CHECKPOINT),
    ("pretrain_distill.py", NEW_MODEL.replace("--mock-data", "--data-path {p}/none"), DATA),
    ("tools/evaluate.py", "--load {p}/none --data-path x {n} {b}", CHECKPOINT),
    (
        "tools/evaluate.py",
        "--load {p}/teacher --data-path x --tokenizer-type SentencePieceTokenizer "
        "--tokenizer-model {p}/none {b}",
        DATA,
    ),
    ("tools/generate.py", "--load {p}/none --prompt x {n}", CHECKPOINT),
    ("tools/inspect_checkpoint.py", "--load {p}/none", CHECKPOINT),
    ("tools/preprocess_data.py", "--input {p}/none --output-prefix {p}/new {n}", DATA),
    ("tools/convert.py", "import --hf {p}/none --save {p}/new", CHECKPOINT),
    ("tools/convert.py", "export --load {p}/none --hf {p}/new", CHECKPOINT),
    ("tools/plot_scores.py", "--scores {p}/none --out {p}/new.png", USAGE),
]


@pytest.mark.parametrize(("program", "line", "expected"), REFUSED)
def test_refused_flags_and_missing_files_import_no_torch(program, line, expected, place):
    batch = "--seq-length 16 --micro-batch-size 1"
    line = line.format(p=place, n=NULL, c=CUT, r=RUN, b=batch)
    code, modules, said = imported(program, line)
    assert (code, modules) == (expected, []), said
    assert said.count("ERROR: ") == 1


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("prune.py", "--load {p}/teacher --save {p}/new {d} {c}"),
        ("pretrain_distill.py", "--load {p}/teacher --finetune --teacher-load {p}/teacher {d} {r}"),
        ("pretrain_distill.py", NEW_MODEL),
        ("tools/convert.py", "export --load {p}/teacher --hf {p}/new --model-type llama"),
    ],
)
def test_dry_runs_import_no_torch(program, line, place):
    corpus = shlex.join(data_flags(LLAMA, str(place / "corpus")))
    line = line.format(p=place, d=corpus, c=CUT, r=RUN) + " --dry-run"
    assert imported(program, line)[:2] == (0, []), imported(program, line)[2]


# ---------------------------------------------------------------- what is read without torch


def without_stand_ins(args):
    return {k: v for k, v in args.items() if type(v) in (bool, int, float, str, type(None), dict)}


@pytest.mark.parametrize("name", ["new", *EXPECTED])
def test_a_glance_at_a_checkpoint_sees_what_reading_sees(name, place, tmp_path):
    folder = str(place / "teacher") if name == "new" else unpack(name, tmp_path)
    quick, real = glance(folder), checkpoints.read(folder)
    assert (quick.folder, quick.iteration, quick.arch) == (real.folder, real.iteration, real.arch)
    assert quick.args.keys() == real.args.keys()
    assert without_stand_ins(quick.args) == without_stand_ins(real.args)


def test_what_a_glance_does_not_understand_is_refused_as_by_reading(tmp_path):
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (folder / ".metadata").write_bytes(b"")
    torch.save({"args": Namespace(), "x": subprocess.Popen}, folder / "common.pt")
    messages = []
    for read in (glance, checkpoints.read):
        with pytest.raises(UserError, match="refused") as error:
            read(str(folder))
        messages.append((error.value.code, str(error.value)))
    assert messages[0] == messages[1]


def test_tokens_are_counted_as_megatron_core_counts(tmp_path):
    null = replace(Data(), tokenizer_type="NullTokenizer", vocab_size=7)
    model = train_sentencepiece(tmp_path / "t.model")
    piece = replace(Data(), tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    for data in (null, piece):
        assert vocab_size(data) == build_tokenizer(data).vocab_size
    absent = replace(piece, tokenizer_model=str(tmp_path / "none"))
    messages = []
    for refuse in (check_tokenizer_file, build_tokenizer, vocab_size):
        with pytest.raises(UserError) as error:
            refuse(absent)
        messages.append((error.value.code, str(error.value)))
    assert len(set(messages)) == 1


@pytest.mark.parametrize("typed", ["a", "a b", "3 a", "0.5 a .5 b", "1 a b c", "a b c", "1e3 a"])
def test_blends_are_read_as_megatron_core_reads_them(typed):
    words = tuple(typed.split())
    weights = data_check._weights(words)
    paths = words if weights is None else words[1::2]
    assert (list(paths), weights) == get_blend_from_list(list(words))


@pytest.mark.parametrize("split", ["969,30,1", "1,1,1", "0,1", "1,0,2", "100", "0.1, .7, 3."])
def test_splits_are_cut_as_megatron_core_cuts_them(split):
    parts = [float(part) for part in split.split(",")]
    shares = data_check.parse_split(split)
    assert shares == normalize(parts + [0.0] * (3 - len(parts)))
    assert data_check._shares(shares) == convert_split_vector_to_split_matrix(shares)


def test_codes_of_integers_are_megatron_cores():
    for code, dtype in data_check.INTEGERS.items():
        assert DType.dtype_from_code(code) is dtype


# ---------------------------------------------------------------- torch.compile


def test_functions_are_compiled_when_they_are_called_first(monkeypatch):
    compiled = []

    def compile_now(function, **options):
        compiled.append((function.__name__, options))
        return lambda x: function(x) + 100

    monkeypatch.delenv(heavy.DISABLE, raising=False)
    monkeypatch.setattr(torch, "compile", compile_now)
    with heavy.imports():

        @torch.compile
        def double(x):
            return 2 * x

        @torch.compile(dynamic=True)
        def triple(x):
            return 3 * x

    assert torch.compile is compile_now
    assert (compiled, double.__name__) == ([], "double")
    assert (double(1), double(2), triple(1)) == (102, 104, 103)
    assert compiled == [("double", {}), ("triple", {"dynamic": True})]
    monkeypatch.setenv(heavy.DISABLE, "1")
    with heavy.imports():
        plain = torch.compile(lambda x: x + 1)
    assert plain(1) == 2
