"""Every program that reads weights refuses those that are damaged or are no numbers."""

import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.runtime.errors import CHECKPOINT, DATA
from megatron_ext.runtime.files import written_aside
from tests.models import LLAMA
from tests.programs import data_flags, fail, succeed, write_corpus, write_model

ARCH = replace(LLAMA, num_layers=2)
STEPS = "--train-iters 2 --global-batch-size 2"
TRAIN = f"{STEPS} --lr 1e-3 --save-interval 2 --eval-iters 0 --save {{new}}"
# program, its flags; {bad} is the checkpoint, {ok} another one, {new} what would be written
PROGRAMS = [
    ("prune", "--load {bad} {data} --calibration-samples 2 --target-hidden-size 40 --save {new}"),
    ("pretrain_distill", "--load {bad} {data} " + TRAIN),
    ("pretrain_distill", "--load {ok} --teacher-load {bad} {data} " + TRAIN),
    ("tools.evaluate", "--load {bad} {eval} --json {new}"),
    ("tools.evaluate", "--load {ok} --teacher-load {bad} {eval} --json {new}"),
    ("tools.generate", "--load {bad} --prompt 5 --max-new-tokens 2 {tokenizer}"),
    (
        "tools.store_teacher",
        f"--teacher-load {{bad}} {{data}} --kd-teacher-store {{new}} --kd-top-k 3 {STEPS}",
    ),
    ("tools.convert", "export --load {bad} --hf {new} --model-type llama"),
]


def poison(model):
    model.decoder.layers[1].mlp.linear_fc2.weight[3, 5] = float("nan")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    write_model(str(folder / "ok"), ARCH)
    write_model(str(folder / "nan"), ARCH, poison)
    shutil.copytree(folder / "ok", folder / "flipped")
    flip_a_bit(max(folder.glob("flipped/*/*.distcp"), key=lambda path: path.stat().st_size))
    write_corpus(folder / "corpus", ARCH.vocab_size)
    return folder


def flags_of(root, line, **places):
    data = " ".join(data_flags(ARCH, str(root / "corpus")))
    reads = f"--data-path {root}/corpus --seq-length 16 --micro-batch-size 1 "
    tokenizer = "--tokenizer-type NullTokenizer --vocab-size 100"
    reads += tokenizer
    names = {"ok": root / "ok", "data": data, "eval": reads, "tokenizer": tokenizer}
    return line.format(**names, **places).split()


@pytest.mark.parametrize(("kind", "word"), [("flipped", "is damaged"), ("nan", "NaN")])
@pytest.mark.parametrize(("program", "line"), PROGRAMS)
def test_damaged_weights_are_refused(program, line, kind, word, root, tmp_path):
    """Regression: an export published a flipped bit, and NaN, with 0."""
    argv = flags_of(root, line, bad=root / kind, new=tmp_path / "new")
    code, message = fail(program, argv)
    assert code == CHECKPOINT, message
    assert str(root / kind) in message
    assert word in message
    assert not any(path.is_file() for path in tmp_path.rglob("*.distcp"))


def test_nan_is_not_imported(root, tmp_path):
    hf = tmp_path / "hf"
    succeed("tools.convert", flags_of(root, PROGRAMS[-1][1], bad=root / "ok", new=hf))
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][1, 2] = torch.inf
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    code, message = fail("tools.convert", ["import", "--hf", str(hf), "--save", f"{tmp_path}/in"])
    assert code == CHECKPOINT, message
    assert name in message
    assert not list(tmp_path.glob("in/*"))


def another_bit(path):
    flip_a_bit(path)


def nan_inside(path):
    tensors = load_file(path)
    tensors["log_probs"][0, 0, 0] = torch.nan
    save_file(tensors, path)


def token_outside(path):
    tensors = load_file(path)
    tensors["tokens"][0, 0, 0] = 100
    save_file(tensors, path)


def one_tensor_less(path):
    tensors = load_file(path)
    del tensors["digests"]
    save_file(tensors, path)


@pytest.mark.parametrize("damage", [another_bit, nan_inside, token_outside, one_tensor_less])
def test_a_damaged_store_is_refused(damage, root, tmp_path):
    """Regression: a flipped byte of a stored teacher trained on, with 0."""
    store = tmp_path / "store"
    line = PROGRAMS[6][1]
    succeed("tools.store_teacher", flags_of(root, line, bad=root / "ok", new=store))
    (file,) = store.glob("*.safetensors")
    assert file.stat().st_mode & stat.S_IROTH, "others cannot read it"
    damage(file)
    argv = flags_of(
        root, f"--load {{ok}} --kd-teacher-store {store} {{data}} " + TRAIN, new="/none"
    )
    code, message = fail("pretrain_distill", argv)
    assert code == DATA, message
    assert str(file) in message


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_says(umask, tmp_path):
    """Regression: what safetensors wrote could be read by nobody else, whatever the umask."""
    import os

    before = os.umask(umask)
    try:
        with written_aside(tmp_path / "file") as aside:
            save_file({"x": torch.zeros(2)}, aside)
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path(tmp_path / "file").stat().st_mode) == 0o666 & ~umask
