"""The loss of a Hugging Face folder in transformers, on the samples that tools/evaluate.py reads.

python examples/gpt2/check.py --hf DIR --data-path PREFIX --seq-length 256 --samples 16 --json FILE
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.cli.parser import REQUIRED, flag, parse
from megatron_ext.runtime.errors import run_main
from megatron_ext.runtime.extras import need


@dataclass(frozen=True, kw_only=True)
class Check:
    """Check."""

    hf: str = flag(REQUIRED, "Hugging Face folder")
    data_path: str = flag(REQUIRED, "prefix of indexed data")
    seq_length: int = flag(REQUIRED, "tokens of a sample", at_least=1)
    samples: int = flag(REQUIRED, "samples, spread evenly over the data", at_least=1)
    json: str = flag(REQUIRED, "file for the loss")


@dataclass(frozen=True, kw_only=True)
class CheckFlags:
    """Compute the loss of a Hugging Face folder with transformers alone."""

    check: Check


def main(argv: Sequence[str] | None = None) -> None:
    """Write the loss."""
    options = parse(CheckFlags, argv).check
    transformers = need("transformers", "hf", "the comparison")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        options.hf, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.hf)
    tokens = numpy.concatenate(list(IndexedDataset(options.data_path))).astype(numpy.int64)
    length, samples = options.seq_length, options.samples
    in_all = -(-(len(tokens) - 1) // length)
    firsts = [length * (i * in_all // samples) for i in range(samples)]
    pieces = [torch.from_numpy(tokens[first : first + length + 1]) for first in firsts]
    inputs, labels = [x[:-1] for x in pieces], [x[1:] for x in pieces]
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model.eval()(x[None]).logits[0], y)
            for x, y in zip(inputs, labels, strict=True)
        ]
    loss = float(torch.stack(losses).mean())
    Path(options.json).write_text(json.dumps({"lm loss": loss}) + "\n")
    print(f"{options.hf}: {model.num_parameters():,} parameters, loss {loss:.6f}")
    print(f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    run_main(main)
