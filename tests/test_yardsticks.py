"""Yardsticks of generated text, on texts that one can count."""

import math

import pytest
import torch

from megatron_ext.inference.yardsticks import agreed, distinct, mean_nll, repeated


def test_distinct_ngrams():
    assert distinct([1, 2, 3, 4], 2) == 1.0
    assert distinct([1, 1, 1, 1, 1], 2) == 0.25
    assert distinct([1, 2, 1, 2, 3], 2) == 0.75  # 12 21 12 23
    assert distinct([1], 2) == distinct([], 1) == 1.0


def test_tokens_that_repeat_what_stood_before():
    assert repeated([1, 2, 3, 4, 5, 6], 3) == 0.0
    assert repeated([1, 2, 3, 9, 1, 2, 3], 3) == pytest.approx(3 / 7)
    assert repeated([7] * 6, 2) == pytest.approx(5 / 6)  # all but the first
    assert repeated([], 2) == 0.0


def test_tokens_until_two_texts_part():
    assert agreed([1, 2, 3], [1, 2, 4, 3]) == 2
    assert agreed([1, 2], [1, 2, 3]) == 2
    assert agreed([5], [6]) == agreed([], [1]) == 0


def test_loss_of_a_continuation():
    """Logits are the logarithms of probabilities; columns from 3 on are padding."""
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.3, 0.5], [1, 1, 1]])
    logits = torch.cat([probs.log(), torch.full((4, 2), 50.0)], dim=1)
    tokens = [2, 1, 2, 0]  # the first two are given
    expected = -(math.log(0.8) + math.log(0.2)) / 2
    assert mean_nll(logits, tokens, 2, vocab_size=3) == pytest.approx(expected, rel=1e-6)
    assert mean_nll(logits, tokens, 3, vocab_size=3) == pytest.approx(-math.log(0.2), rel=1e-6)
