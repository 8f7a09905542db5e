"""The cost of importance hooks: a forward pass with them against one without.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=99999999999 python tools/bench/calibration.py

Runs take turns, and every pass with hooks is compared with the bare one just before it. On a CPU
times are processor time of one thread, which other programs change little; on a GPU, of the clock,
over four passes in a row: a calibration does not wait between micro-batches.
Without the two settings fresh memory costs more than the arithmetic.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_ext.arch import Arch
from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.pruning.aggregation import Aggregation
from megatron_ext.pruning.importance import Importance
from megatron_ext.runtime import platform
from megatron_ext.runtime.platform import Platform

VARIANTS = {
    "default": Aggregation(),
    "sequence l2": Aggregation(sequence="l2"),
    "sequence var": Aggregation(sequence="var"),
    "neurons pre": Aggregation(neurons="pre"),
    "heads aggregate-first": Aggregation(heads="aggregate-first"),
}
IN_A_ROW = 4  # passes, on a GPU
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Print one row per dtype and aggregation."""
    flags = parse()
    place = platform.initialize()
    torch.set_num_threads(1)
    print(f"{'dtype':8}{'aggregation':24}{'bare ms':>10}{'hooks ms':>10}{'added':>9}{'range':>18}")
    for name, dtype in DTYPES.items():
        for variant, (bare, hooked) in times(flags, place, dtype).items():
            added = [b / a - 1 for a, b in zip(bare, hooked, strict=True)]
            low, middle, high = statistics.quantiles(added, n=4)
            columns = f"{statistics.median(bare):10.1f}{statistics.median(hooked):10.1f}"
            print(f"{name:8}{variant:24}{columns}{middle:9.1%}{f'{low:.1%} .. {high:.1%}':>18}")


def times(
    flags: argparse.Namespace, place: Platform, dtype: torch.dtype
) -> dict[str, tuple[list[float], list[float]]]:
    """Return milliseconds of bare passes and of those with hooks, per aggregation."""
    arch = Arch(
        num_layers=flags.num_layers,
        hidden_size=flags.hidden_size,
        ffn_hidden_size=flags.ffn_hidden_size,
        num_attention_heads=flags.hidden_size // 64,
        num_query_groups=flags.hidden_size // 64,
        kv_channels=64,
        max_position_embeddings=flags.seq_length,
        vocab_size=1024,
        padded_vocab_size=1024,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
    )
    options = ModelOptions(params_dtype=dtype, fuse_kernels=place.device.type == "cuda")
    model = build_model(arch, options, place.groups)[0].eval()
    draw_weights(model, arch.init_method_std, seed=1)
    model.post_process = False
    tokens = torch.randint(1024, (flags.samples, flags.seq_length), device=place.device)
    positions = torch.arange(flags.seq_length, device=place.device).expand_as(tokens)

    @torch.no_grad()
    def forward() -> None:
        model(tokens, positions, None)

    hooks = {
        variant: Importance(
            [model], arch, place.groups, sequence_parallel=False, aggregation=aggregation
        )
        for variant, aggregation in VARIANTS.items()
    }
    result: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in hooks}
    for turn in range(flags.repeats + 2):
        for variant, importance in hooks.items():
            bare = milliseconds(forward, place)
            importance.expect(torch.ones_like(tokens))
            with importance.attached():
                hooked = milliseconds(forward, place)
            if turn >= 2:  # the first ones warm up
                result[variant][0].append(bare)
                result[variant][1].append(hooked)
    return result


@torch.no_grad()
def draw_weights(model: torch.nn.Module, std: float, seed: int) -> None:
    """Fill matrices on their device, billions of numbers in a second; vectors stay as built."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=std, generator=generator)


def milliseconds(action: Callable[[], None], place: Platform) -> float:
    """Return how long ``action`` takes, on the device too."""
    if place.device.type == "cpu":
        start = time.process_time()
        action()
        return 1000 * (time.process_time() - start)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(IN_A_ROW):
        action()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / IN_A_ROW


def parse() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--ffn-hidden-size", type=int, default=1536)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=4, help="of one forward pass")
    parser.add_argument("--repeats", type=int, default=15, help="pairs of passes per row")
    return parser.parse_args()


if __name__ == "__main__":
    main()
