"""The harness itself: results come by rank, and a failing or dying rank fails the test."""

import importlib.util
import os
import sys
import time

import pytest
import torch

from tests.ranks import PRELOAD, run_ranks


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


def _imported_and_seconds():
    return [name in sys.modules for name in HEAVY], time.process_time()


HEAVY = ("megatron.core.models.gpt", "megatron_ext.training.run", "megatron_ext.pruning.run")


def test_ranks_are_forked_with_what_they_need():
    """Regression: programs that import late left each rank to import torch and megatron-core."""
    for name in PRELOAD:  # the server is silent about what it cannot import
        assert importlib.util.find_spec(name), name
    imported, seconds = run_ranks(1, _imported_and_seconds)[0]
    assert all(imported)
    assert seconds < 2
