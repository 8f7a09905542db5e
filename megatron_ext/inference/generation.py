"""The run of tools/generate.py: texts continued, one forward pass for each token.

``flags`` are that program's.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ext.checkpoint import checkpoints
from megatron_ext.checkpoint.folder import Checkpoint
from megatron_ext.checkpoint.identity import check_comparable
from megatron_ext.data import datasets
from megatron_ext.inference.yardsticks import agreed, distinct, mean_nll, repeated
from megatron_ext.model.config import ModelOptions, choose_transformer_impl
from megatron_ext.model.open import open_model, read_models
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import CHECKPOINT, USAGE, UserError
from megatron_ext.runtime.platform import Platform

# Tokens [n], n >= 1, to the logits of the token that follows each, [n, padded_vocab_size].
Logits = Callable[[list[int]], Tensor]
# ... and of the last alone, [padded_vocab_size].
NextLogits = Callable[[list[int]], Tensor]
# n-grams of which a text should not repeat many, and of which most should be different.
REPEATED, DIFFERENT = 4, 2


def generate(flags: Any, folder: Path, teacher_folder: Path | None) -> None:
    """Print each prompt and its continuation by the checkpoint in ``folder``; then yardsticks.

    Yardsticks are printed beside a teacher: its loss on the continuations, and how many tokens they
    have in common with its own.
    """
    options = flags.generation
    folders = [folder, *([teacher_folder] if teacher_folder else [])]
    _, tokenizer, (source, *teachers) = read_models(flags.tokenizer, *folders)
    if source.arch.is_bert:
        raise UserError(f"{source.folder} is a BertModel, which continues no texts.", CHECKPOINT)
    for teacher in teachers:
        check_comparable(source.arch, teacher.arch)
    prompts = [tokens_of(text, tokenizer, source.arch.vocab_size) for text in options.prompt]
    for text, ids in zip(options.prompt, prompts, strict=True):
        for arch in (model.arch for model in (source, *teachers)):
            check_length(text, len(ids), options.max_new_tokens, arch.max_position_embeddings)

    place = platform.initialize(device=options.device)
    for model in (source, *teachers):
        checkpoints.verify_integrity(model.folder)
    how = {
        "max_new_tokens": options.max_new_tokens,
        "eod": tokenizer.eod,
        "vocab_size": source.arch.vocab_size,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "seed": options.seed,
    }
    logits, continuations = load_model(source, place), []
    for text, ids in zip(options.prompt, prompts, strict=True):
        new = continue_tokens(_last(logits), ids, **how)
        # Many tokenizers drop a space at the beginning of what they turn into text.
        whole, head = tokenizer.detokenize(ids + new), tokenizer.detokenize(ids)
        print(f"--- prompt\n{text}\n--- continuation, {len(new)} tokens\n{whole[len(head) :]}\n")
        continuations.append(new)
    for teacher in teachers:
        print(measured(load_model(teacher, place), prompts, continuations, how))
    platform.shut_down()


@torch.no_grad()
def measured(
    teacher: Logits,
    prompts: Sequence[list[int]],
    continuations: Sequence[list[int]],
    how: Mapping[str, Any],
) -> str:
    """Return the yardsticks of continuations beside a teacher, means over those that have tokens.

    ``how``: the settings of ``continue_tokens``, for the teacher's own texts.
    """
    rows = []
    for prompt, new in zip(prompts, continuations, strict=True):
        if new:
            own = continue_tokens(_last(teacher), prompt, **how)
            tokens = prompt + new
            loss = mean_nll(teacher(tokens), tokens, len(prompt), how["vocab_size"])
            rows.append((loss, repeated(new, REPEATED), distinct(new, DIFFERENT), agreed(new, own)))
    if not rows:
        return "--- yardsticks\nnone: no continuation has a token"
    loss, again, different, common = (sum(x) / len(rows) for x in zip(*rows, strict=True))
    return (
        f"--- yardsticks, means of {len(rows)} continuations\n"
        f"loss of the teacher on them, nats per token   {loss:.3f}\n"
        f"tokens in {REPEATED}-grams that stood there before        {again:.1%}\n"
        f"{DIFFERENT}-grams that are different                   {different:.1%}\n"
        f"tokens until the teacher's own text parts     {common:.1f}"
    )


def tokens_of(prompt: str, tokenizer: datasets.MegatronTokenizerBase, vocab_size: int) -> list[int]:
    """Return the tokens of a prompt, at least one, each below ``vocab_size``."""
    try:
        ids = tokenizer.tokenize(prompt) if prompt else []
    except ValueError as error:
        raise UserError(
            f"--prompt {prompt!r}: the tokenizer refuses it ({error}).", USAGE
        ) from error
    if not ids:
        raise UserError(f"--prompt {prompt!r} has no tokens: give at least one.", USAGE)
    if not all(0 <= token < vocab_size for token in ids):  # NullTokenizer takes any
        raise UserError(f"--prompt {prompt!r}: tokens are 0 to {vocab_size - 1}.", USAGE)
    return ids


def check_length(prompt: str, num_tokens: int, max_new_tokens: int, num_positions: int) -> None:
    """Refuse a prompt that the model has no positions to continue."""
    if num_tokens + max_new_tokens > num_positions:
        raise UserError(
            f"--prompt {prompt[:40]!r} has {num_tokens} tokens; with --max-new-tokens "
            f"{max_new_tokens} that is more than the model's {num_positions} positions.",
            USAGE,
        )


def load_model(source: Checkpoint, place: Platform) -> Logits:
    """Return the model of ``source`` in the precision that it was saved in, on this process."""
    options = ModelOptions(
        params_dtype=source.args.get("params_dtype", torch.float32),
        transformer_impl=choose_transformer_impl(None, place.device),
    )
    (model,) = open_model(source, options, place.groups)
    model.eval()

    def logits(ids: list[int]) -> Tensor:
        tokens = torch.tensor([ids], device=place.device)
        positions = torch.arange(len(ids), device=place.device).unsqueeze(0)
        return model(tokens, positions, None)[:, 0]  # of [s, 1, padded_vocab_size]

    return logits


def _last(logits: Logits) -> NextLogits:
    return lambda ids: logits(ids)[-1]


@torch.no_grad()
def continue_tokens(
    next_logits: NextLogits,
    prompt: list[int],
    *,
    max_new_tokens: int,
    eod: int,
    vocab_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 1234,
) -> list[int]:
    """Return up to ``max_new_tokens`` tokens that follow ``prompt``; the end of document is none.

    Args:
        next_logits: the model.
        prompt: one token or more.
        max_new_tokens: where to stop at the latest.
        eod: the token that ends a document.
        vocab_size: logits from here on are padding and are never chosen.
        temperature: 0 takes the likeliest token.
        top_k: sample from that many tokens; None from all.
        seed: of sampling.
    """
    generator = torch.Generator().manual_seed(seed)
    new: list[int] = []
    for _ in tqdm(range(max_new_tokens), "generating", unit="token", disable=None, leave=False):
        logits = next_logits(prompt + new)[:vocab_size].float().cpu()
        token = choose(logits, temperature, top_k, generator)
        if token == eod:
            break
        new.append(token)
    return new


def choose(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    """Return the token of [vocab_size] float32 logits: the likeliest, or one drawn."""
    if temperature == 0:
        return int(logits.argmax())
    values, tokens = logits.topk(min(top_k or len(logits), len(logits)))
    drawn = torch.multinomial((values / temperature).softmax(0), 1, generator=generator)
    return int(tokens[drawn])
