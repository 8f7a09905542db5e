"""The cost of a distillation step beside its parts: teacher forward and student training step.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=99999999999 python tools/bench/distillation_step.py

The three take turns; the student's own step has the cross entropy that the distillation step leaves
out. Without the optimizer, which is the same in both. On a CPU times are processor time of one
thread.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_ext.arch import Arch
from megatron_ext.distillation.losses import KD_LOSS
from megatron_ext.distillation.model import Distillation, DistillationModel
from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.runtime import platform
from megatron_ext.runtime.platform import Platform
from tools.bench.calibration import DTYPES, milliseconds


def main() -> None:
    """Print one row per dtype."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9, help="rounds of the three")
    flags = parser.parse_args()
    place = platform.initialize()
    torch.set_num_threads(1)
    print(f"{'dtype':8}{'output':10}{'apart ms':>10}{'together ms':>13}{'added':>9}{'range':>18}")
    for name, dtype in DTYPES.items():
        for output in ("whole", "fused"):
            apart, together = times(flags, place, dtype, fused=output == "fused")
            added = [b / a - 1 for a, b in zip(apart, together, strict=True)]
            low, middle, high = statistics.quantiles(added, n=4)
            columns = f"{statistics.median(apart):10.1f}{statistics.median(together):13.1f}"
            print(f"{name:8}{output:10}{columns}{middle:9.1%}{f'{low:.1%} .. {high:.1%}':>18}")


def times(
    flags: argparse.Namespace, place: Platform, dtype: torch.dtype, *, fused: bool
) -> tuple[list[float], list[float]]:
    """Return milliseconds of the two parts, summed, and of the step that has both."""
    teacher_arch = Arch(
        num_layers=8,
        hidden_size=512,
        ffn_hidden_size=1536,
        num_attention_heads=8,
        num_query_groups=8,
        kv_channels=64,
        max_position_embeddings=flags.seq_length,
        vocab_size=flags.vocab_size,
        padded_vocab_size=flags.vocab_size,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    student_arch = replace(teacher_arch, hidden_size=384, ffn_hidden_size=1024)
    options = ModelOptions(params_dtype=dtype)
    (teacher,) = build_model(teacher_arch, options, place.groups, seed=1)
    (student,) = build_model(student_arch, options, place.groups, seed=2)
    distillation = Distillation(fused_output=fused, vocab_size=flags.vocab_size)
    both = DistillationModel(student, teacher, distillation, place.groups.tp)
    tokens = torch.randint(flags.vocab_size, (1, flags.seq_length), device=place.device)
    positions = torch.arange(flags.seq_length, device=place.device).expand_as(tokens)
    mask = torch.ones_like(tokens, dtype=torch.float32)

    def teacher_forward() -> None:
        teacher.leaves_out_output_layer = False
        with torch.no_grad():
            teacher(tokens, positions, None)

    def student_step() -> None:
        student.leaves_out_output_layer = False
        student.zero_grad(set_to_none=True)
        student(tokens, positions, None, labels=tokens).sum().backward()

    def distillation_step() -> None:
        student.leaves_out_output_layer = teacher.leaves_out_output_layer = fused
        student.zero_grad(set_to_none=True)
        losses = both(tokens, positions, None, labels=tokens, loss_mask=mask)
        (losses[KD_LOSS] * mask).sum().backward()

    steps: list[Callable[[], None]] = [teacher_forward, student_step, distillation_step]
    apart, together = [], []
    for turn in range(flags.repeats + 2):
        found = [milliseconds(step, place) for step in steps]
        if turn >= 2:  # the first ones warm up
            apart.append(found[0] + found[1])
            together.append(found[2])
    return apart, together


if __name__ == "__main__":
    main()
