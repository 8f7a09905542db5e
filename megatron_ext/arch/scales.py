"""Constants by which a model multiplies what passes: Granite's.

Megatron-LM has no such args: they have no flags here, and are left out where it loads a checkpoint.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ext.arch.sizes import Arch


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Factors; each is a field of ``Arch``."""

    embedding_multiplier: float = 1.0
    """Of the embedding's output."""
    residual_multiplier: float = 1.0
    """Of the output of each sub-layer, before it is added."""
    logits_scaling: float = 1.0
    """By which logits are divided."""


def problems(arch: "Arch") -> Iterator[str]:
    """Yield how these sizes contradict each other."""
    if arch.logits_scaling == 0:
        yield "logits_scaling is 0, by which logits are divided."
    scaled = [f.name for f in fields(Sizes) if getattr(arch, f.name) != 1]
    if arch.is_bert and scaled:
        yield f"{scaled[0]} does not go with --bert-no-binary-head."
