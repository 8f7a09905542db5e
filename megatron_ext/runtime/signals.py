"""The signals that ask a program to stop when it has saved."""

import signal
from typing import Any

INTERRUPTS_TO_END = 3
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Catches the signals that ask a run to stop, so that it can finish its step and save.

    SIGTERM and SIGUSR1 ask and no more, however often: SLURM and torchrun, which send them, kill by
    themselves what takes too long. Ctrl-C is a person's, and the third SIGINT ends the process at
    once. Not the second: one Ctrl-C arrives twice, from the terminal and from torchrun, which
    passes on what it gets. No clock can tell such an echo from a second Ctrl-C: Python runs
    handlers between bytecodes, so that it waits for as long as a call into C takes.
    """

    def __init__(self) -> None:
        self.caught: int = 0
        self.interrupts = 0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            # None: a handler that is not Python's, which Python cannot put back.
            self.previous[number] = signal.signal(number, self._catch) or signal.SIG_DFL
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: Any) -> None:
        self.caught = self.caught or number
        self.interrupts += number == signal.SIGINT
        if self.interrupts == INTERRUPTS_TO_END:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)
