"""Yardsticks of generated text beside its loss: a model may predict well and still loop.

A continuation is the list of tokens that a model adds to a prompt.
"""

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor


def distinct(tokens: Sequence[int], n: int) -> float:
    """Return how many of a text's n-grams are different, as a share of all; 1.0 without any."""
    grams = _grams(tokens, n)
    return len(set(grams)) / len(grams) if grams else 1.0


def repeated(tokens: Sequence[int], n: int) -> float:
    """Return the share of tokens that lie in an n-gram that stood in the text before."""
    seen: set[tuple[int, ...]] = set()
    covered: set[int] = set()
    for start, gram in enumerate(_grams(tokens, n)):
        if gram in seen:
            covered.update(range(start, start + n))
        seen.add(gram)
    return len(covered) / len(tokens) if tokens else 0.0


def agreed(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Return how many tokens two continuations of a prompt have in common before they part."""
    both = zip(tokens, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))


def mean_nll(logits: Tensor, tokens: Sequence[int], num_given: int, vocab_size: int) -> float:
    """Return a model's mean loss over a continuation, nats per token.

    Args:
        logits: [s, v] of the model at each of the s tokens of prompt and continuation.
        tokens: the s tokens.
        num_given: how many of them are the prompt's; 1 or more, and fewer than s.
        vocab_size: logits from here on are padding.
    """
    log_probs = logits[num_given - 1 : -1, :vocab_size].double().log_softmax(-1)  # [s - given, V]
    targets = torch.tensor(tokens[num_given:], device=logits.device)
    return -log_probs.gather(-1, targets.unsqueeze(-1)).mean().item()


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
