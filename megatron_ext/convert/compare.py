"""The logits of a Megatron checkpoint beside those of transformers, of a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_ext.checkpoint import checkpoints
from megatron_ext.checkpoint.folder import Checkpoint
from megatron_ext.convert.hf_files import CONFIG, read_json
from megatron_ext.model.config import ModelOptions, choose_transformer_impl
from megatron_ext.model.open import open_model
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import CHECKPOINT, DIFFERS, USAGE, UserError
from megatron_ext.runtime.extras import need


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Differences between two models' logits of the same tokens."""

    largest: float
    """Difference of two logits."""
    mean: float
    scale: float
    """The largest logit of transformers."""
    agreement: float
    """Share of positions with the same likeliest token."""
    losses: tuple[float, float]
    """Mean cross-entropy in nats, of transformers and of the checkpoint."""


def check_model(options: Any, folder: Path) -> int:
    """Print how far the checkpoint in ``folder`` is from ``options.hf``; returns the exit code."""
    need("transformers", "hf", "convert check")
    source = checkpoints.read(str(folder))
    config = read_json(Path(options.hf) / CONFIG)
    tokens = tokens_of(options, source, config)
    # Before the platform, which changes torch.
    expected = hf_logits(options.hf, tokens, masked=source.arch.is_bert)
    found = megatron_logits(source, tokens)
    gap = compare(found, expected, tokens, masked=source.arch.is_bert)
    print(table(gap, tokens))
    agrees = gap.largest <= options.tolerance * gap.scale  # not of NaN
    verdict = "OK: within" if agrees else "DIFFERS: not within"
    print(f"{verdict} {options.tolerance:g} of the largest logit (--tolerance)")
    return 0 if agrees else DIFFERS


def tokens_of(options: Any, source: Checkpoint, config: dict[str, Any]) -> Tensor:
    """Return the tokens [n, s]: those of --tokens, or random ones that both models know."""
    arch = source.arch
    vocab_size = min(arch.vocab_size, config.get("vocab_size", arch.vocab_size))
    keys = ("max_position_embeddings", "n_positions")
    positions = min(config.get(key, arch.max_position_embeddings) for key in keys)
    positions = min(positions, arch.max_position_embeddings)
    if options.tokens:
        wrong = [token for token in options.tokens if not 0 <= token < vocab_size]
        if wrong or len(options.tokens) > positions:
            raise UserError(
                f"--tokens: {len(options.tokens)} tokens, of {min(options.tokens)} to "
                f"{max(options.tokens)}: the models have {positions} positions and tokens 0 to "
                f"{vocab_size - 1}.",
                USAGE,
            )
        return torch.tensor([options.tokens])
    length = min(options.seq_length, positions)
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randint(vocab_size, (options.samples, length), generator=generator)


def hf_logits(folder: str, tokens: Tensor, *, masked: bool) -> Tensor:
    """Return transformers' logits [n, s, rows] of ``folder``, computed in float32."""
    import transformers

    kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    try:
        model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    except Exception as error:  # every kind
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--hf {folder}: transformers cannot load it: {reason}", CHECKPOINT
        ) from None
    with torch.no_grad():
        return model.eval()(tokens).logits


def megatron_logits(source: Checkpoint, tokens: Tensor) -> Tensor:
    """Return the checkpoint's logits [n, s, padded rows], computed in float32 on this CPU."""
    place = platform.initialize(device="cpu")
    checkpoints.verify_integrity(source.folder)
    options = ModelOptions(transformer_impl=choose_transformer_impl(None, place.device))
    (model,) = open_model(source, options, place.groups)
    positions = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    with torch.no_grad():
        logits = model.eval()(tokens, positions, None)  # [s, n, v]
    platform.shut_down()
    return logits.transpose(0, 1)


def compare(found: Tensor, expected: Tensor, tokens: Tensor, *, masked: bool) -> Gap:
    """Return what tells two models apart on the columns that both have.

    Args:
        found: logits [n, s, v] of the checkpoint.
        expected: logits [n, s, v'] of transformers.
        tokens: [n, s]; each is predicted from those before it, or of a masked language model from
            all.
        masked: whether it is one.
    """
    columns = min(found.size(-1), expected.size(-1))
    found, expected = (logits[..., :columns].double() for logits in (found, expected))
    difference = (found - expected).abs()
    labels = tokens if masked else tokens[:, 1:]

    def loss(logits: Tensor) -> float:
        used = logits if masked else logits[:, :-1]
        return float(cross_entropy(used.flatten(0, 1), labels.flatten()))

    return Gap(
        largest=float(difference.max()),
        mean=float(difference.mean()),
        scale=float(expected.abs().max()),
        agreement=float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
        losses=(loss(expected), loss(found)),
    )


def table(gap: Gap, tokens: Tensor) -> str:
    """Return the figures as lines."""
    return "\n".join(
        (
            f"{'tokens':12}{tokens.shape[0]} x {tokens.shape[1]}",
            f"{'logits':12}largest difference {gap.largest:.3g}, mean {gap.mean:.3g}; the largest "
            f"logit is {gap.scale:.3g}",
            f"{'top-1':12}the same at {gap.agreement:.2%} of {tokens.numel()} positions",
            f"{'mean loss':12}{gap.losses[0]:.6f} transformers, {gap.losses[1]:.6f} the checkpoint",
        )
    )
