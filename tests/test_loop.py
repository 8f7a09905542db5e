"""What the training loop holds on to, it lets go: signals, the garbage collector, hooks."""

import gc
import itertools
import signal
from types import SimpleNamespace

import pytest

from megatron_ext.training import loop


def sequence_of_signals(*numbers):
    """Return what the run was asked by, after these; an hour passes between two of them."""
    clock = itertools.count(step=3600.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        with loop.StopSignals() as stop:
            for number in numbers:
                signal.raise_signal(number)
    return stop.caught


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGINT] * 2,  # Ctrl-C reaches torchrun too, which passes it on
        [signal.SIGTERM] * 4,
        [signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM],  # SLURM, and SLURM at the limit
        [signal.SIGUSR1, signal.SIGINT, signal.SIGINT],
    ],
)
def test_the_echo_of_a_signal_ends_nothing_however_late(numbers):
    """Regression: one that a long call into C put off by 5 s was taken for a second wish."""
    before = [signal.getsignal(number) for number in loop.STOP_SIGNALS]
    assert sequence_of_signals(*numbers) == numbers[0]
    assert [signal.getsignal(number) for number in loop.STOP_SIGNALS] == before


def test_the_third_ctrl_c_ends_the_run_at_once():
    with pytest.raises(KeyboardInterrupt):
        sequence_of_signals(signal.SIGTERM, *[signal.SIGINT] * 3)


def test_a_handler_that_is_not_pythons(monkeypatch):
    """Regression: signal.signal returns None for such a one, and does not take it."""
    catch, taken = signal.signal, []

    def over_a_foreign_handler(number, handler):
        taken.append((number, handler))
        before = catch(number, handler)
        return None if callable(handler) else before

    old = {number: signal.getsignal(number) for number in loop.STOP_SIGNALS}
    try:
        monkeypatch.setattr(loop.signal, "signal", over_a_foreign_handler)
        with loop.StopSignals():
            assert len(taken) == len(loop.STOP_SIGNALS)
        assert [signal.getsignal(number) for number in loop.STOP_SIGNALS] == [signal.SIG_DFL] * 3
    finally:
        for number, handler in old.items():
            catch(number, handler)


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
