"""Settings of every test."""

import os
import sys

import pytest

# Tensors of tests are small: threads of two workers on two cores wait for each other, busily.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _torch_stays_as_it_is():
    """Ranks live in processes of their own: here, megatron-core's needs would change torch.

    Regression: transformers' rotary tables came out as garbage in the tests behind such a one.
    """
    yield
    # Not imported above: the process that hands out the tests would import torch for it, first.
    if platform := sys.modules.get("megatron_ext.runtime.platform"):
        emulated = platform.emulate_cuda_on_cpu.cache_info().currsize
        assert not emulated, "run it with run_ranks or succeed"
