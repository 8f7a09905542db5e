"""The harness itself: results come by rank, and a failing or dying rank fails the test."""

import os
import sys

import pytest
import torch

from tests.programs import NEW_MODEL, _run_main
from tests.ranks import run_ranks


def _sum_of_ranks():
    x = torch.tensor([float(torch.distributed.get_rank())])
    torch.distributed.all_reduce(x)
    return x


def _one_fails():
    if torch.distributed.get_rank() == 1:
        raise ValueError("seven")
    torch.distributed.barrier()


def _one_dies():
    if torch.distributed.get_rank() == 1:
        os._exit(1)
    torch.distributed.barrier()


def test_results_by_rank():
    assert [x.item() for x in run_ranks(3, _sum_of_ranks)] == [3.0, 3.0, 3.0]


def test_a_failing_rank_is_named():
    with pytest.raises(AssertionError, match=r"rank [01] of 2 failed"):
        run_ranks(2, _one_fails)


def test_a_dying_rank_is_noticed():
    with pytest.raises(AssertionError, match=r"rank 1 of 2 died|rank 0 of 2 failed"):
        run_ranks(2, _one_dies)


def _preloaded_and_late(argv):
    """Return whether the server has imported all it should, and what a program imports here."""
    before = set(sys.modules)
    assert _run_main("pretrain_distill", argv, None).code == 0
    return "tests.preload" in before, set(sys.modules) - before


def test_ranks_are_forked_with_what_they_need(tmp_path):
    """Regression: ranks imported transformers' tokenizers each on its own, for most of their time.

    The server is silent about what it cannot import.
    """
    argv = [*NEW_MODEL.split(), "--save", str(tmp_path), "--save-interval", "1"]
    ((is_preloaded, late),) = run_ranks(1, _preloaded_and_late, argv)
    assert is_preloaded
    assert len(late) < 10, late
