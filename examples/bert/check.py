"""Compare the logits of a Megatron checkpoint with those that transformers computes.

    python examples/bert/check.py --load OUT/student --hf OUT/hf-student

Prints the largest difference, as a share of the largest logit; more than 1e-4 is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_ext.checkpoint import checkpoints
from megatron_ext.cli.parser import REQUIRED, flag, parse
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.open import open_model
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import UserError, run_main
from megatron_ext.runtime.extras import need

TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Check:
    """Models."""

    load: str = flag(REQUIRED, "folder of the checkpoint")
    hf: str = flag(REQUIRED, "Hugging Face folder of the same model")


@dataclass(frozen=True, kw_only=True)
class CheckFlags:
    """Compare a checkpoint with a Hugging Face folder."""

    check: Check


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Print the difference on a batch of random tokens."""
    flags = parse(CheckFlags, argv).check
    transformers = need("transformers", "hf", "the comparison")
    source = checkpoints.read(flags.load)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(source.arch.vocab_size, (2, 128), generator=generator)
    positions = torch.arange(128).expand(2, 128)
    # First, because initialize makes of torch on a CPU what megatron-core expects.
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(flags.hf, dtype=torch.float32)
    expected = theirs.eval()(tokens).logits
    (ours,) = open_model(source, ModelOptions(), platform.initialize().groups)
    found = ours.eval()(tokens, positions, None).transpose(0, 1)[..., : expected.size(-1)]
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"{flags.hf}: {theirs.num_parameters():,} parameters, difference {difference:.1e}")
    if difference > TOLERANCE:
        raise UserError(f"{flags.load} and {flags.hf} differ by {difference:.1e}.")
    platform.shut_down()


if __name__ == "__main__":
    run_main(main)
