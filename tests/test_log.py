"""What a run says, where it cannot be written."""

from pathlib import Path

from megatron_ext import checkpoint
from megatron_ext.training import log
from tests.models import LLAMA
from tests.programs import data_flags, model_flags, run_program, write_corpus


def fill_the_disk():
    log._reopen = lambda *_: Path("/dev/full").open("a")  # noqa: SIM115


def test_a_full_disk_costs_metrics_not_the_run(tmp_path):
    """Regression: rank 0 ended with a traceback, and the others waited for it."""
    corpus = write_corpus(tmp_path / "corpus", LLAMA.vocab_size)
    run = "--lr 1e-3 --train-iters 3 --save-interval 3 --log-interval 1 --eval-iters 0"
    argv = [
        *data_flags(LLAMA, corpus),
        *model_flags(LLAMA),
        *run.split(),
        "--save",
        str(tmp_path / "save"),
    ]
    outcomes = run_program("pretrain_distill", argv, 2, fill_the_disk)
    assert [o.code for o in outcomes] == [0, 0], outcomes[0].stderr
    assert outcomes[0].stderr.count("no metrics are written from here on") == 1
    assert "iteration        3/" in outcomes[0].stdout
    assert checkpoint.find(str(tmp_path / "save"))
