"""What ends a run, or does not have to, is one line: files, flags and limits that are wrong."""

import json
import os
import resource
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.runtime import errors
from megatron_ext.runtime.errors import CHECKPOINT, DATA, RUNTIME, USAGE
from megatron_ext.runtime.texts import TOO_DEEP
from megatron_ext.training import saving
from tests.models import LLAMA
from tests.programs import (
    NEW_MODEL,
    data_flags,
    fail,
    model_flags,
    read_metrics,
    run_program,
    succeed,
    write_corpus,
    write_model,
)

RUN = f"{NEW_MODEL} --global-batch-size 2 --eval-iters 0 --num-workers 0 --log-interval 1"
DEEP = "[" * 100_000
ARCH = replace(LLAMA, num_layers=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a checkpoint, its Hugging Face folder and a corpus."""
    folder = tmp_path_factory.mktemp("root")
    write_model(str(folder / "model"), ARCH)
    export = f"export --load {folder}/model --hf {folder}/hf --model-type mistral"
    succeed("tools.convert", export.split())
    write_corpus(folder / "corpus", ARCH.vocab_size)
    return folder


# ---------------------------------------------------------------- texts that are nested too deeply

PRUNE = "--load {model} --importance random --seq-length 8 --micro-batch-size 1 --save {new}"
TRAIN = f"{NEW_MODEL} --eval-iters 0 --num-workers 0"
# program, its flags, the file in them
DEEP_TEXTS = [
    ("tools.convert", "import --hf {folder} --save {new}", "config.json"),
    ("tools.convert", "import --hf {folder} --save {new}", "model.safetensors.index.json"),
    (
        "tools.estimate",
        "--load-config {folder}/config.json --seq-length 8 --micro-batch-size 1",
        "config.json",
    ),
    ("prune", PRUNE + " --plan {folder}/plan --target-num-layers 1", "plan"),
    ("prune", PRUNE + " --targets {folder}/targets", "targets"),
    ("prune", PRUNE + " --target-params 5e4 --search-space {folder}/space", "space"),
    ("pretrain_distill", TRAIN + " --teacher-load {model} --export-kd-cfg {folder}/cfg", "cfg"),
    ("pretrain_distill", TRAIN + " --per-split-data-args-path {folder}/blends", "blends"),
    (
        "tools.preprocess_data",
        "--input {folder}/in.jsonl --output-prefix {new} --tokenizer-type NullTokenizer "
        "--vocab-size 9",
        "in.jsonl",
    ),
]


@pytest.mark.parametrize(("program", "line", "name"), DEEP_TEXTS)
def test_a_text_that_is_nested_too_deeply(program, line, name, root, tmp_path):
    """Regression: RecursionError's traceback."""
    folder = Path(shutil.copytree(root / "hf", tmp_path / "in"))
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(DEEP + "\n")
    names = {"model": root / "model", "folder": folder, "new": tmp_path / "new"}
    code, message = fail(program, line.format(**names).split())
    assert code in (USAGE, CHECKPOINT, DATA)
    assert name in message
    assert TOO_DEEP in message
    assert "\n" not in message


# ---------------------------------------------------------------- config.json of absurd sizes


@pytest.mark.parametrize("value", [10**9, 10**15])
@pytest.mark.parametrize(
    "key",
    [
        *("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size"),
        *("num_attention_heads", "num_key_value_heads", "head_dim"),
    ],
)
def test_sizes_that_the_files_do_not_hold_end_an_import_at_once(key, value, root, tmp_path):
    """Regression: a table with a row for each of a billion layers was begun."""
    hf, save = Path(shutil.copytree(root / "hf", tmp_path / "hf")), tmp_path / "save"
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, key: value}))
    argv = ["import", "--hf", str(hf), "--save", str(save)]
    code, message = fail("tools.convert", argv, 1, in_little_memory)
    assert code == CHECKPOINT
    assert "\n" not in message
    # A dry run reads no weights: it ends, too.
    (outcome,) = run_program("tools.convert", [*argv, "--dry-run"], 1, in_little_memory)
    assert outcome.code in (0, CHECKPOINT)


def in_little_memory():
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, most))


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kinds", [(0, 1), (1, 0)])
def test_optimizer_state_of_another_kind(kinds, world_size, tmp_path):
    """Regression: a KeyError: 'pre_wd_mult'."""
    argv = [*RUN.split(), "--save", str(tmp_path / "a"), "--save-interval", "1"]
    before, now = (["--use-distributed-optimizer"] * is_split for is_split in kinds)
    succeed("pretrain_distill", [*argv, *before], world_size)
    code, message = fail("pretrain_distill", [*argv, "--train-iters", "2", *now], world_size)
    assert code == CHECKPOINT
    assert f"/iter_0000001 was saved with{'out' * (not before)} " in message
    assert "--use-distributed-optimizer" in message
    assert "--no-load-optim" in message
    assert "\n" not in message
    argv += ["--train-iters", "2", *now, "--no-load-optim"]
    succeed("pretrain_distill", argv, world_size)


def without(name):
    def saved_args(run):
        args = saved(run)
        delattr(args, name)
        return args

    saved, saving.saved_args = saving.saved_args, saved_args


def without_counter():
    without("consumed_train_samples")


def test_a_checkpoint_without_its_counter(tmp_path):
    save = str(tmp_path / "save")
    argv = [*RUN.split(), "--save", save, "--save-interval", "1"]
    (outcome,) = run_program("pretrain_distill", argv, 1, without_counter)
    assert outcome.code == 0
    code, message = fail("pretrain_distill", [*argv, "--train-iters", "2"])
    assert code == CHECKPOINT
    assert f"{save}/iter_0000001 does not hold consumed_train_samples" in message
    succeed("pretrain_distill", [*RUN.split(), "--load", save, "--finetune"])


def test_a_folder_inside_a_tokenizer_goes_along(root, tmp_path):
    model = Path(shutil.copytree(root / "model", tmp_path / "model"))
    (model / "release/tokenizer/empty").mkdir(parents=True)
    (model / "release/tokenizer/more").mkdir()
    (model / "release/tokenizer/more/words.txt").write_text("one")
    argv = PRUNE.format(model=model, new=tmp_path / "new").split()
    succeed("prune", [*argv, "--target-ffn-hidden-size", "48"])
    assert (tmp_path / "new/release/tokenizer/more/words.txt").read_text() == "one"


# ---------------------------------------------------------------- indices of data


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-9])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def lost(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut_off, flipped, lost])
def test_an_index_cache_that_is_damaged_is_built_again(damage, root, tmp_path):
    """Regression: a truncated one ended every later run; a flipped bit is other data."""
    cache = tmp_path / "cache"
    flags = [*data_flags(ARCH, str(root / "corpus")), *model_flags(ARCH)]
    flags += ["--data-cache-path", str(cache), "--log-interval", "1", "--save-interval", "2"]
    flags += shlex.split("--train-iters 2 --global-batch-size 2 --lr 1 --eval-iters 0")
    succeed("pretrain_distill", [*flags, "--save", str(tmp_path / "one")])
    (folder,) = cache.iterdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in sorted(name for name in before if name.endswith(".npy")):
        damage(folder / name)
    (outcome,) = succeed("pretrain_distill", [*flags, "--save", str(tmp_path / "two")])
    assert f"{folder} is not as it was built: it is built again" in outcome.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert read_metrics(tmp_path / "one") == read_metrics(tmp_path / "two")


# ---------------------------------------------------------------- flags and limits


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--seed 100000000000000000000", "--seed 100000000000000000000: must be <= "),
        ("--seed 1e20", "--seed"),
        ("--seed 4294967296", "--seed 4294967296: must be <= "),
        ("--train-iters 100000000000000000000", "--train-iters 100000000000000000000: must be"),
        ("--swiglu --lr 1", "--hidden-size 16 with --swiglu: the default of --ffn-hidden-size"),
    ],
)
def test_numbers_that_cannot_be(typed, words):
    code, message = fail("pretrain_distill", [*RUN.split(), *typed.split()])
    assert code == USAGE
    assert words in message
    assert "\n" not in message


def few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def test_few_open_files(tmp_path):
    """Regression: gloo's traceback."""
    argv = [*RUN.split(), "--save", str(tmp_path / "save"), "--save-interval", "1"]
    code, message = fail("pretrain_distill", argv, 2, few_files)
    assert code == RUNTIME
    assert message == "too many open files, of 64 that a process may have: raise ulimit -n."


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_board_that_cannot_be_written_is_a_warning(place, tmp_path):
    """Regression: it ended the run."""
    (tmp_path / "file").write_text("")
    board = os.path.join(tmp_path, place)
    argv = [*RUN.split(), "--save", str(tmp_path / "save"), "--save-interval", "1"]
    argv += ["--tensorboard-dir", board]
    outcomes = run_program("pretrain_distill", argv, 2)
    assert [o.code for o in outcomes] == [0, 0], outcomes[0].stderr
    assert f"WARNING: --tensorboard-dir {board}: " in outcomes[0].stderr
    assert len(read_metrics(tmp_path / "save")) == 1


@pytest.mark.parametrize("flag", ["--hidden-size", "--vocab-size"])
def test_a_model_that_fits_no_memory(flag):
    code, message = fail("pretrain_distill", [*RUN.split(), flag, "100000000000"], 2)
    assert code == RUNTIME
    assert message.startswith("out of memory (")
    assert "\n" not in message


def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    argv = [*RUN.split(), "--train-iters", "3", "--tensorboard-dir", str(tmp_path / "file")]
    argv += shlex.split("--profile --use-pytorch-profiler --profile-step-start 1")
    argv += ["--profile-step-end", "2"]
    (outcome,) = run_program("pretrain_distill", argv)
    assert outcome.code == 0, outcome.stderr
    assert "WARNING: --profile: nothing is written: " in outcome.stderr


def test_a_run_of_more_samples_than_an_index_holds(root):
    """Regression: it went on building the index for ever."""
    argv = [*data_flags(ARCH, str(root / "corpus")), *model_flags(ARCH), "--lr", "1"]
    code, message = fail("pretrain_distill", [*argv, "--train-iters", "1000000000000"])
    assert code == USAGE
    assert "a run of 1000000000000 samples" in message


def test_a_file_in_place_of_a_save(tmp_path):
    (tmp_path / "save").write_text("")
    argv = [*RUN.split(), "--save", str(tmp_path / "save"), "--save-interval", "1"]
    code, message = fail("pretrain_distill", argv)
    assert code in (RUNTIME, CHECKPOINT)
    assert "--save" in message


@pytest.mark.parametrize(
    ("said", "line"),
    [("a reason..", "a reason."), ("a reason.", "a reason."), ("and so on...", "and so on...")],
)
def test_a_line_ends_with_one_stop(said, line, capsys):
    """A library's reason ends with a full stop, or not."""
    assert str(errors.UserError(said)) == line
    errors.warn(said)
    errors.note(said)
    out, err = capsys.readouterr()
    assert (out, err) == (f"NOTE: {line}\n", f"WARNING: {line}\n")
