"""The training loop switches on again what it switches off: garbage collector, hooks."""

import gc
from types import SimpleNamespace

import pytest

from megatron_ext.training import loop


def fail_where(condition):
    assert condition
    raise ZeroDivisionError


def test_garbage_is_collected_again_after_an_error():
    """Regression: an error in the loop left Python's collector off."""
    with pytest.raises(ZeroDivisionError), loop.collecting_by_hand(True):
        fail_where(not gc.isenabled())
    assert gc.isenabled()


def test_parameters_are_gathered_late_again_after_an_error():
    """Regression: an evaluation that failed left megatron-core's forward hooks off."""
    said = []
    chunk = SimpleNamespace(
        disable_forward_pre_hook=lambda: said.append("off"),
        enable_forward_pre_hook=lambda: said.append("on"),
    )
    flags = SimpleNamespace(parallel=SimpleNamespace(overlap_param_gather=True))
    run = SimpleNamespace(model=[chunk], flags=flags)
    with pytest.raises(ZeroDivisionError), loop.gathered_parameters(run):
        fail_where(said == ["off"])
    assert said == ["off", "on"]
