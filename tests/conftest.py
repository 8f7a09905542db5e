"""What holds for every test."""

import pytest

from megatron_ext.runtime.platform import emulate_cuda_on_cpu


@pytest.fixture(autouse=True)
def _torch_stays_as_it_is():
    """Ranks live in processes of their own: here, megatron-core's needs would change torch.

    Regression: transformers' rotary tables came out as garbage in the tests behind such a one.
    """
    yield
    assert not emulate_cuda_on_cpu.cache_info().currsize, "run it with run_ranks or succeed"
