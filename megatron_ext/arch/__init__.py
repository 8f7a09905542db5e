"""A model's sizes, its sub-layers and the one table of its weights: plain data, without torch."""

from megatron_ext.arch.mlp import is_gelu
from megatron_ext.arch.moe import LOAD_BALANCING
from megatron_ext.arch.rows import Weight
from megatron_ext.arch.sizes import Arch
from megatron_ext.arch.table import (
    LAYER_PREFIXES,
    count,
    dim_sizes,
    forward_flops,
    is_of_experts,
    kind_of,
    layer_key,
    names_on_disk,
    num_parameters,
    numel_of,
    shape,
    weights,
)
from megatron_ext.arch.unsupported import UNSUPPORTED, check_supported

__all__ = [
    "LAYER_PREFIXES",
    "LOAD_BALANCING",
    "UNSUPPORTED",
    "Arch",
    "Weight",
    "check_supported",
    "count",
    "dim_sizes",
    "forward_flops",
    "is_gelu",
    "is_of_experts",
    "kind_of",
    "layer_key",
    "names_on_disk",
    "num_parameters",
    "numel_of",
    "shape",
    "weights",
]
