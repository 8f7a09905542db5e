"""Overlap of tensor-parallel communication with matrix products, through Transformer Engine.

Its user buffers have one width and belong to the model that is trained; the teacher's layers use
NCCL as without it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from megatron_ext.arch import Arch
from megatron_ext.cli.parser import flag, option
from megatron_ext.model.fp8 import Fp8
from megatron_ext.runtime.errors import USAGE, UserError
from megatron_ext.runtime.texts import parse_yaml


@dataclass(frozen=True, kw_only=True)
class TpOverlap:
    """Tensor-parallel overlap (Transformer Engine)."""

    tp_comm_overlap: bool = flag(
        False, "send and receive while matrices are multiplied; needs --sequence-parallel"
    )
    tp_comm_overlap_cfg: str | None = flag(
        None, "YAML file with Transformer Engine's settings of each product; default its own"
    )
    tp_comm_bulk_wgrad: bool = flag(
        True,
        "do not scatter input gradients during weight gradients",
        off="--disable-tp-comm-bulk-wgrad",
        aliases=("--no-tp-comm-bulk-wgrad",),
    )
    tp_comm_bulk_dgrad: bool = flag(
        True,
        "do not gather inputs during input gradients",
        off="--disable-tp-comm-bulk-dgrad",
        aliases=("--no-tp-comm-bulk-dgrad",),
    )
    tp_comm_overlap_ag: bool = flag(
        True,
        "do not overlap all-gathers with products",
        off="--disable-tp-comm-overlap-ag",
        aliases=("--no-tp-comm-overlap-ag",),
    )
    tp_comm_overlap_rs: bool = flag(
        True,
        "do not overlap reduce-scatters with products",
        off="--disable-tp-comm-overlap-rs",
        aliases=("--no-tp-comm-overlap-rs",),
    )
    tp_comm_overlap_rs_dgrad: bool = flag(
        False, "overlap reduce-scatters with the products of input gradients"
    )
    tp_comm_bootstrap_backend: str = flag(
        "nccl", "how ranks find each other's buffers", choices=("nccl", "mpi", "gloo")
    )


def of_student(overlap: TpOverlap) -> dict[str, Any]:
    """Return megatron-core's settings of the model that is trained; empty without overlap."""
    if not overlap.tp_comm_overlap:
        return {}
    names = {f.name for f in fields(overlap)} - {"tp_comm_overlap_cfg"}
    return {name: getattr(overlap, name) for name in names}


def problems(overlap: TpOverlap, parallel: Any) -> Iterator[str]:
    """Problems of flags among each other, a line each; ``parallel`` are the flags of the layout."""
    if not overlap.tp_comm_overlap:
        for field in fields(overlap):
            if getattr(overlap, field.name) != field.default:
                yield f"{option(field)} needs --tp-comm-overlap."
        return
    if parallel.tensor_model_parallel_size == 1 or not parallel.sequence_parallel:
        yield (
            "--tp-comm-overlap needs --tensor-model-parallel-size above 1 and --sequence-parallel."
        )
    if parallel.transformer_impl == "local":
        yield "--tp-comm-overlap needs --transformer-impl transformer_engine."


def start(
    overlap: TpOverlap, arch: Arch, fp8: Fp8, *, tokens: int, tp_size: int, transformer_impl: str
) -> None:
    """Make Transformer Engine's buffers for the model that is trained. Collective.

    Args:
        overlap: the flags.
        arch: the model's sizes.
        fp8: the flags of FP8: buffers of FP8, or of both kinds where some layers are in bf16.
        tokens: of a micro-batch over the tensor-parallel ranks of one context-parallel rank.
        tp_size: tensor-parallel ranks.
        transformer_impl: of the model's layers.

    Raises:
        UserError: with code ``USAGE``; local layers, or a file that cannot be read.
    """
    if not overlap.tp_comm_overlap:
        return
    if transformer_impl != "transformer_engine":
        raise UserError("--tp-comm-overlap needs a GPU and Transformer Engine's layers.", USAGE)
    from transformer_engine.pytorch.module.base import UserBufferQuantizationMode, initialize_ub

    modes = [UserBufferQuantizationMode.FP8] if fp8.fp8_format else []
    if not fp8.fp8_format or fp8.first_last_layers_bf16:
        modes.append(UserBufferQuantizationMode.NONE)
    initialize_ub(
        shape=[tokens, arch.hidden_size],
        tp_size=tp_size,
        quantization_modes=modes,
        ub_cfgs=read_settings(overlap.tp_comm_overlap_cfg),
        bootstrap_backend=overlap.tp_comm_bootstrap_backend,
    )


def read_settings(path: str | None) -> dict[str, Any] | None:
    """Return {product: {setting: value}} of a YAML file; None without one.

    Raises:
        UserError: with code ``USAGE``; it cannot be read, or holds something else.
    """
    if path is None:
        return None
    try:
        with open(path) as file:
            settings = parse_yaml(file.read())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--tp-comm-overlap-cfg {path} cannot be read: {reason}.", USAGE) from error
    if not isinstance(settings, dict) or not all(isinstance(x, dict) for x in settings.values()):
        raise UserError(
            f"--tp-comm-overlap-cfg {path}: write product: {{setting: value}}, e.g. "
            "qkv_fprop: {method: ring_exchange}.",
            USAGE,
        )
    return settings
