"""The GPUs that a dry run knows: memory and peak rates, from data sheets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peak rates and memory of one GPU."""

    memory: int
    """Bytes: the vendor's GB as 10^9. torch finds some 5 % more, which is left for what is not
    counted here."""
    bf16: float
    """Dense TFLOP/s."""
    fp8: float | None
    """Dense TFLOP/s; None where there is no FP8."""


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, HGX B200 (an eighth). They print twice
# the dense figures, for sparse matrices, but for A100's.
GPUS = {
    "A100": Gpu(80 * 10**9, 312, None),
    "H100": Gpu(80 * 10**9, 989, 1979),
    "H200": Gpu(141 * 10**9, 989, 1979),
    "B200": Gpu(180 * 10**9, 2250, 4500),
}
