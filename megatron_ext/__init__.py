"""LLM pruning and distillation on megatron-core (Minitron, arXiv 2407.14679)."""

import warnings

__version__ = "0.1.0"  # pyproject.toml and CITATION.cff say the same

# Said by megatron-core and torch on every rank, of things that are as intended here: no Apex or
# Transformer Engine on a CPU, and functions that megatron-core calls and torch has deprecated.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "The following imports from `dynamic_context.py`",
    "`torch.jit.script",
    "Please use DTensor instead",
    "`load_state_dict` is deprecated",
    "`torch.distributed.",
    "numpy.core is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)
