"""LLM pruning and distillation on megatron-core (Minitron, arXiv 2407.14679)."""

import logging
import warnings

__version__ = "0.1.0"  # pyproject.toml and CITATION.cff say the same

# Said by megatron-core and torch on every rank, of things that are as intended here: no Apex or
# Transformer Engine on a CPU, and functions that megatron-core calls and torch has deprecated.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "absl.logging is not installed",
    "full scope is deprecated",
    "The following imports from `dynamic_context.py`",
    "`torch.jit.script",
    "Please use DTensor instead",
    "`load_state_dict` is deprecated",
    "`torch.distributed.",
    "numpy.core is deprecated",
    "MimoModelConfig is experimental",
    "The argument order of load has been changed",
    "torch.distributed is disabled, unavailable or uninitialized",
):
    warnings.filterwarnings("ignore", message=_message)
# Logged by megatron-core for every model: a GPTModel is what is built here, and
# DistributedDataParallel computes the very layout that it asks for.
for _module, _message in (
    ("models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout"),
):
    logging.getLogger(f"megatron.core.{_module}").addFilter(
        lambda record, start=_message: not record.getMessage().startswith(start)
    )
