"""megatron-core's Mamba layer, with a mixer that needs no kernels.

``Mixer`` is megatron-core's with the same parameters, names on disk and forward pass; only what
mamba_ssm, causal_conv1d and einops do there is plain torch here. Where they are installed and there
is a GPU, megatron-core's own is built.

Shape letters in this file, beside those of ``mamba_scan``:
    s  positions on this rank, of S of all context-parallel ranks
    C  channels of the convolution: of all heads x, then B and C of all groups
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_context_parallel import (
    _all_to_all_cp2hp,
    _all_to_all_hp2cp,
    _redo_attention_load_balancing,
    _undo_attention_load_balancing,
)
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_ext.arch.mamba import TAPS
from megatron_ext.model.layers import Norm
from megatron_ext.model.mamba_scan import causal_conv, scan

# megatron-core's, whatever the epsilon of the other norms.
EPSILON = 1e-5


class GatedNorm(nn.Module):
    """RMSNorm of gated heads over the channels of each group of heads, [..., h P] in and out."""

    def __init__(self, num_channels: int, num_groups: int, tp_group: ProcessGroup, **options: Any):
        super().__init__()
        self.num_groups, self.tp_group = num_groups, tp_group
        self.weight = _split(nn.Parameter(torch.ones(num_channels, **options)))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return the norm of ``x * silu(gate)``, computed in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        gated = (x.to(wide) * F.silu(gate.to(wide))).unflatten(-1, (self.num_groups, -1))
        normal = F.rms_norm(gated, gated.shape[-1:], eps=EPSILON).flatten(-2)
        return (normal * self.weight.to(wide)).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return the weight as a share of all heads'."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class Mixer(MambaMixer):
    """Mamba 2 in plain torch; a tensor-parallel rank has whole groups of heads.

    Under context parallelism a rank computes a share of its heads at all positions: four all-to-all
    there and one back, in forward and in backward. Heads must be a multiple of the ranks, and
    groups a multiple or a divisor of them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ):
        MegatronModule.__init__(self, config)  # megatron-core's own refuses to go without kernels
        self.layer_number, self.pp_layer_offset = layer_number, pp_layer_offset
        self.pg_collection, self.tp_group = pg_collection, pg_collection.tp
        self.cp_group, tp = pg_collection.cp, pg_collection.tp.size()
        # Names of megatron-core's, whose sharded_state_dict reads them.
        self.d_state, self.headdim = config.mamba_state_dim, config.mamba_head_dim
        self.nheads_local_tp = config.mamba_num_heads // tp
        self.ngroups_local_tp = config.mamba_num_groups // tp
        self.d_inner_local_tp = self.nheads_local_tp * self.headdim
        inner = config.mamba_num_heads * self.headdim

        linear = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            sum(self._widths()) * tp,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **linear,
        )
        options = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
        channels, heads = sum(self._widths()[1:4]), self.nheads_local_tp
        self.conv1d_weight = _split(nn.Parameter(torch.empty(channels, 1, TAPS, **options)))
        self.conv1d_bias = _split(nn.Parameter(torch.empty(channels, **options)))
        self.dt_bias = _split(nn.Parameter(torch.empty(heads, **options)))
        self.A_log = _split(nn.Parameter(torch.empty(heads, **options)))
        self.D = _split(nn.Parameter(torch.ones(heads, **options)))
        self.norm = GatedNorm(
            self.d_inner_local_tp, self.ngroups_local_tp, self.tp_group, **options
        )
        self.out_proj = build_module(
            submodules.out_proj,
            inner,
            d_model,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **linear,
        )

    def _widths(self) -> list[int]:
        """Return the channels of z, x, B, C and dt on this tensor-parallel rank."""
        inner, states = self.d_inner_local_tp, self.ngroups_local_tp * self.d_state
        return [inner, inner, states, states, self.nheads_local_tp]

    def forward(
        self, hidden_states: Tensor, inference_context: None = None, packed_seq_params: None = None
    ) -> tuple[Tensor, None]:
        """Return [s, B, H] of [s, B, H], under sequence parallelism this rank's positions of both.

        No inference states are kept, and samples are not packed.
        """
        assert inference_context is None, "Mamba keeps no states here"
        assert packed_seq_params is None, "Mamba reads no packed samples here"
        projected, _ = self.in_proj(hidden_states)
        gate, *convolved, dt = projected.split(self._widths(), dim=-1)  # [s, B, ...]
        y = self._shared_heads(*convolved, dt)  # [s, B, h P]
        return self.out_proj(self.norm(y, gate))

    def _shared_heads(self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor) -> Tensor:
        """Convolve and scan this context-parallel rank's share of the heads, [s, B, h P]."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        copies = max(1, size // self.ngroups_local_tp)  # ranks that share a group
        share = _Share(rank, size, copies, self._widths()[1:4])
        if size > 1:
            b, c = (share.repeated(each, self.d_state) for each in (b, c))
            x, b, c, dt = (_to_heads(each, self.cp_group) for each in (x, b, c, dt))
        y = self._heads(
            torch.cat([x, b, c], dim=-1),
            dt,
            share.channels(self.conv1d_weight),
            share.channels(self.conv1d_bias),
            *(share.heads(each) for each in (self.dt_bias, self.A_log, self.D)),
        )
        return _to_positions(y, self.cp_group) if size > 1 else y

    def _heads(
        self,
        xbc: Tensor,
        dt: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        dt_bias: Tensor,
        a_log: Tensor,
        skip: Tensor,
    ) -> Tensor:
        """Return [S, B, h P] of [S, B, C] and [S, B, h] for some heads and their groups."""
        inner, dtype = dt.size(-1) * self.headdim, xbc.dtype
        wide = torch.promote_types(dtype, torch.float32)
        xbc = F.silu(causal_conv(xbc, conv_weight, conv_bias)).to(wide)
        x, b, c = xbc.split([inner, *[(xbc.size(-1) - inner) // 2] * 2], dim=-1)
        x = x.unflatten(-1, (-1, self.headdim))  # [S, B, h, P]
        b, c = (each.unflatten(-1, (-1, self.d_state)) for each in (b, c))  # [S, B, g, N]
        steps = F.softplus(dt.to(wide) + dt_bias.to(wide))
        y = scan(x, steps, -a_log.to(wide).exp(), b, c) + skip.to(wide).unsqueeze(-1) * x
        return y.flatten(2).to(dtype)


class _Share:
    """The heads of a context-parallel rank, and the groups that they belong to."""

    def __init__(self, rank: int, size: int, copies: int, widths: list[int]):
        self.rank, self.size, self.copies, self.widths = rank, size, copies, widths

    def heads(self, x: Tensor) -> Tensor:
        """Return this rank's of [h, ...]."""
        return x.chunk(self.size)[self.rank]

    def channels(self, x: Tensor) -> Tensor:
        """Return this rank's of [C, ...]."""
        x, b, c = x.split(self.widths)
        groups = self.size // self.copies, self.rank // self.copies
        return torch.cat([self.heads(x), *(each.chunk(groups[0])[groups[1]] for each in (b, c))])

    def repeated(self, x: Tensor, states: int) -> Tensor:
        """Return [s, B, g N] with each group as often as ranks share it, one copy behind the other.

        Each rank has a copy of its own then.
        """
        return x.unflatten(-1, (-1, states)).repeat_interleave(self.copies, dim=2).flatten(2)


def _to_heads(x: Tensor, cp_group: ProcessGroup) -> Tensor:
    """Return a share of the channels at all positions, in order: [S, B, c / n] of [s, B, c]."""
    return _undo_attention_load_balancing(_all_to_all_cp2hp(x, cp_group), cp_group.size())


def _to_positions(x: Tensor, cp_group: ProcessGroup) -> Tensor:
    """Return the inverse of ``_to_heads``."""
    return _all_to_all_hp2cp(_redo_attention_load_balancing(x, cp_group.size()), cp_group)


def _split(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter as a tensor-parallel rank's share, for norms of gradients."""
    parameter.tensor_model_parallel, parameter.partition_dim = True, 0
    return parameter


def has_kernels() -> bool:
    """Whether megatron-core's own mixer can be built and run."""
    return (
        torch.cuda.current_device() != torch.device("cpu")
        and mamba_mixer.HAVE_MAMBA_SSM
        and mamba_mixer.HAVE_EINOPS
    )


def mamba_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Return megatron-core's Mamba layer, its norm stored inside in_proj in either case."""
    if config.transformer_impl == "local":
        norm, linear = Norm, (ColumnParallelLinear, RowParallelLinear)
        names = {"norm.": "mixer.in_proj.layer_norm_"}
    else:
        from megatron.core.extensions.transformer_engine import (
            TELayerNormColumnParallelLinear,
            TERowParallelLinear,
        )

        norm, linear = IdentityOp, (TELayerNormColumnParallelLinear, TERowParallelLinear)
        names = {}
    mixer = ModuleSpec(
        module=MambaMixer if has_kernels() else Mixer,
        submodules=MambaMixerSubmodules(*linear),
    )
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=norm,
            mixer=mixer,
            mamba_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )
