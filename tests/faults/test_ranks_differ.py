"""Ranks that were started differently, or read different data, end before the first step."""

import os
import sys

import pytest
import torch

from megatron_ext.data import data_check, datasets
from megatron_ext.model import options
from megatron_ext.runtime.errors import DATA, USAGE
from tests.models import LLAMA
from tests.programs import NEW_MODEL, data_flags, fail, model_flags, write_corpus

RUN = f"{NEW_MODEL} --global-batch-size 2 --eval-iters 0 --num-workers 0"


def another_rate():
    if torch.distributed.get_rank() == 1:
        sys.argv[sys.argv.index("--lr") + 1] = "2"


def another_seed():
    if torch.distributed.get_rank() == 1:
        sys.argv += ["--seed", "7"]


def another_loss():
    if torch.distributed.get_rank() == 1:
        sys.argv += ["--clip-grad", "0.5"]


def another_torch():
    if torch.distributed.get_rank() == 1:
        torch.__version__ = "0.1"


def another_code():
    if torch.distributed.get_rank() == 1:
        options.__file__ = datasets.__file__.replace("data", "data/none")


def with_argv(change):
    """Return what changes a rank once its command line is there."""

    def before():
        import pretrain_distill

        main = pretrain_distill.main

        def changed():
            change()
            return main()

        pretrain_distill.main = changed

    return before


def rate():
    with_argv(another_rate)()


def seed():
    with_argv(another_seed)()


def loss():
    with_argv(another_loss)()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rate, "--lr is 1.0 on rank 0 and 2.0 on rank 1"),
        (seed, "--seed is 1234 on rank 0 and 7 on rank 1"),
        (loss, "--clip-grad is 1.0 on rank 0 and 0.5 on rank 1"),
        (another_torch, "the version of torch is"),
        (another_code, "the code of megatron_ext is"),
    ],
)
def test_another_command_or_code(change, words):
    """Regression: they trained on, silently."""
    code, message = fail("pretrain_distill", RUN.split(), 2, change)
    assert code == USAGE, message
    assert words in message
    assert "\n" not in message


def longer_data():
    size = os.path.getsize
    if torch.distributed.get_rank() == 1:
        os.path.getsize = lambda path: size(path) + str(path).endswith(".bin")


def corpus_flags(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", LLAMA.vocab_size)
    steps = "--train-iters 1 --global-batch-size 2 --lr 1 --eval-iters 0"
    return [*data_flags(LLAMA, corpus), *model_flags(LLAMA), *steps.split()], corpus


def test_other_data(tmp_path):
    code, message = fail("pretrain_distill", corpus_flags(tmp_path)[0], 2, longer_data)
    assert code == DATA, message
    assert f"{tmp_path}/corpus.bin is" in message


def sample_one_token():
    data_check.SAMPLED_DOCUMENTS = data_check.SAMPLED_TOKENS = 1


@pytest.mark.parametrize(
    ("world_size", "layout"), [(1, ""), (2, ""), (2, "--tensor-model-parallel-size 2")]
)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_token_outside_the_vocabulary(place, world_size, layout, tmp_path):
    """Regression: behind the sampled tokens, TP1 was an IndexError, TP2 trained on silently."""
    argv, corpus = corpus_flags(tmp_path)
    size = os.path.getsize(f"{corpus}.bin")
    with open(f"{corpus}.bin", "r+b") as file:
        file.seek(2 * 19 if place == "first" else size - 2)
        file.write((LLAMA.vocab_size).to_bytes(2, "little"))
    code, message = fail("pretrain_distill", [*argv, *layout.split()], world_size, sample_one_token)
    assert code == DATA, message
    assert (
        f"{corpus}.bin: document {0 if place == 'first' else 59} has token id {LLAMA.vocab_size} "
        in message
    )
    assert f"the tokenizer has {LLAMA.vocab_size}" in message
