"""Weights are numbers: what is NaN or infinite is refused where weights are read."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from megatron_ext.runtime.errors import CHECKPOINT, UserError


def check_finite(where: str | Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that are not finite. No collectives.

    Args:
        where: the folder that they come from.
        tensors: name and tensor, of any shape and float dtype.

    Raises:
        UserError: on this rank, naming the first one.
    """
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            raise UserError(
                f"{where}: {name} has NaN or infinite values; take a checkpoint from before they "
                "appeared.",
                CHECKPOINT,
            )
