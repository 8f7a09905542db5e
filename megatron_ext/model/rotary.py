"""Rotary embeddings: arguments of megatron-core's, and a table of two bases for windows."""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ext.arch import Arch


def periods(arch: Arch) -> dict[str, Any]:
    """Return the arguments about rotary embeddings that every model of megatron-core takes."""
    return {
        "rotary_percent": arch.rotary_percent,
        "rotary_base": arch.rotary_base,
        "seq_len_interpolation_factor": arch.rotary_seq_len_interpolation_factor,
    }


def scaled_periods(arch: Arch) -> dict[str, Any]:
    """Return those that a GPTModel takes; a HybridModel of megatron-core 0.19.2 lacks the scale."""
    scale = {"rope_scaling": arch.use_rope_scaling, "rope_scaling_factor": arch.rope_scaling_factor}
    return periods(arch) | scale


def embedding_options(
    arch: Arch, config: TransformerConfig, cp_group: ProcessGroup
) -> dict[str, Any]:
    """Return the arguments of a ``RotaryEmbedding`` beside a model of ``arch``."""
    return {
        "kv_channels": arch.kv_channels,
        "rotary_interleaved": arch.rotary_interleaved,
        "use_cpu_initialization": config.use_cpu_initialization,
        "cp_group": cp_group,
        **scaled_periods(arch),
    }


class TwoBases(RotaryEmbedding):
    """The tables of both bases side by side: of layers without a window, of those with one."""

    def __init__(self, local_base: int, **options: Any):
        super().__init__(**options)
        plain = {"rotary_base": local_base, "seq_len_interpolation_factor": None}
        self.local = RotaryEmbedding(**{**options, **plain, "rope_scaling": False})

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """Return [S, 1, 1, 2 D], under context parallelism this rank's positions."""
        tables = super().forward(*args, **options), self.local(*args, **options)
        return torch.cat(tables, dim=-1)


class AttentionOfTwoBases(SelfAttention):
    """Attention that takes the half of the table that is its layer's."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        frequency = self.config.window_attn_skip_freq
        has_window = is_layer_window_attention(
            self.config.window_size, frequency, self.layer_number
        )
        self.half = int(has_window)

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **options: Any) -> Any:
        """Return what attention does with its half of ``rotary_pos_emb``, [S, 1, 1, 2 D]."""
        table = rotary_pos_emb.chunk(2, dim=-1)[self.half]
        return super().forward(*args, rotary_pos_emb=table, **options)
