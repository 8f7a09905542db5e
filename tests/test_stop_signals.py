"""Signals that ask a program to stop: only a third Ctrl-C ends it at once."""

import itertools
import signal
import time

import pytest

from megatron_ext.runtime.signals import STOP_SIGNALS, StopSignals


def sequence_of_signals(*numbers):
    """Return what the run was asked by, after these; an hour passes between two of them."""
    clock = itertools.count(step=3600.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: next(clock))
        with StopSignals() as stop:
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
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    assert sequence_of_signals(*numbers) == numbers[0]
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


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

    old = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        monkeypatch.setattr(signal, "signal", over_a_foreign_handler)
        with StopSignals():
            assert len(taken) == len(STOP_SIGNALS)
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == [signal.SIG_DFL] * 3
    finally:
        for number, handler in old.items():
            catch(number, handler)
