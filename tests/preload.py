"""Modules that ranks import, imported once: in the server that forks them (``tests.ranks``).

Each of these that is missing here costs every rank 0.05 to 0.6 s.
"""

import gc
import importlib

MODULES = (
    # The programs, and what they import behind their boundary (``runtime.heavy``).
    "prune",
    "pretrain_distill",
    "megatron_ext.certify.ranks",
    "megatron_ext.convert.families",
    "megatron_ext.distillation.hidden",
    "megatron_ext.pruning.run",
    "megatron_ext.training.run",
    # What torch and megatron-core import when optimizers, tokenizers and datasets are made.
    "megatron.core.datasets.helpers",
    "megatron.core.models.mimo",
    "megatron.core.tokenizers.text.models",
    "torch._dynamo",
    "torch.profiler._cupti_monitor",
    "torch.utils.serialization.config",
    "transformers.models.auto",
    # What modules of tests import.
    "pytest",
    "tests.programs",
)
for name in MODULES:
    importlib.import_module(name)
# Else ranks look through all of it for garbage, and copy the memory that they mark.
gc.freeze()
