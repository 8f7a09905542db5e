"""The harness itself: results come by rank, and a failing or dying rank fails the test."""

import os

import pytest
import torch

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
    with pytest.raises(AssertionError, match=r"rank 1 died|rank 0 of 2 failed"):
        run_ranks(2, _one_dies)
