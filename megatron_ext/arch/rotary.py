"""Rotary embeddings of positions: sizes of the whole model; they have no weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ext.arch.rows import size

if TYPE_CHECKING:
    from megatron_ext.arch.sizes import Arch

KINDS = ("rope", "yarn")
"""Values of position_embedding_type with which channels rotate."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Rotation of the channels of queries and keys; each size is a field of ``Arch``."""

    rotary_base: int = size(10000, "base of the rotary periods (theta)", at_least=1)
    rotary_base_local: int | None = None
    """Base in layers with a window; None for rotary_base. No flag: it comes with a checkpoint."""
    rotary_percent: float = size(
        1.0, "share of a head's channels that rotate, 0 to 1", above=0, at_most=1
    )
    rotary_interleaved: bool = size(
        False, "each channel rotates with its neighbour, not with that of the other half"
    )
    rotary_seq_len_interpolation_factor: int | None = size(
        None, "divide positions by this, of --position-embedding-type rope", at_least=1
    )
    no_rope_freq: str | None = size(
        None,
        "layers in which nothing rotates: every N-th, or a list with a 1 for each, '([0]*3+[1])*8'",
    )
    use_rope_scaling: bool = size(False, "scale rotary frequencies as Llama 3.1 does")
    rope_scaling_factor: float = size(8.0, "factor of --use-rope-scaling", at_least=1)
    rotary_scaling_factor: float = size(1.0, "factor of --position-embedding-type yarn", at_least=1)
    yarn_original_max_position_embeddings: int = size(
        4096, "longest sequence before YaRN lengthened it, in tokens", at_least=1
    )
    yarn_beta_fast: float = size(
        32.0, "rotations within that length from which on YaRN keeps a frequency", above=0
    )
    yarn_beta_slow: float = size(
        1.0, "rotations within that length up to which YaRN divides it by its factor", above=0
    )
    yarn_correction_range_round_to_int: bool = size(
        True,
        "YaRN's two bounds lie between channels",
        off="--no-yarn-correction-range-round-to-int",
        shorthands={"--yarn-correction-range-round-to-int": True},
    )
    mscale: float = size(
        1.0, "YaRN multiplies queries and keys by (0.1 mscale ln factor + 1) / ..."
    )
    mscale_all_dim: float = size(0.0, "... (0.1 mscale-all-dim ln factor + 1)")


YARN = (
    "rotary_scaling_factor",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    "mscale",
    "mscale_all_dim",
)
"""Fields that count with --position-embedding-type yarn alone."""


def problems(arch: "Arch") -> Iterator[str]:
    """Yield how these sizes contradict each other."""
    is_rope = arch.position_embedding_type == "rope"
    if arch.rotary_base_local is not None and (arch.is_hybrid or not is_rope):
        yield "rotary_base_local goes with --position-embedding-type rope and whole layers."
    if arch.position_embedding_type != "yarn":
        return
    if arch.rotary_percent != 1:
        yield (
            f"--rotary-percent {arch.rotary_percent}: megatron-core rotates every channel with "
            "--position-embedding-type yarn."
        )
    for name in ("yarn_beta_fast", "yarn_beta_slow"):
        if (value := getattr(arch, name)) <= 0:
            yield f"--{name.replace('_', '-')} must be > 0: {value}."
    if arch.rotary_interleaved:
        yield "--rotary-interleaved does not go with --position-embedding-type yarn."
    if arch.use_rope_scaling or arch.rotary_seq_len_interpolation_factor:
        yield (
            "--use-rope-scaling and --rotary-seq-len-interpolation-factor are of "
            "--position-embedding-type rope, not yarn."
        )
