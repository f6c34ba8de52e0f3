"""Stopping a run early: signals and the time limit."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from litlora.errors import RESUME, StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TIMED_OUT = 124  # the exit code of timeout(1)
SIGNALLED = 128  # plus the signal's number, as in a shell
LAUNCHED = "LITLORA_LAUNCHED"  # set for a process whose launcher forwards signals to it, and ends it at the second


class StopRequest:
    """Whether a signal or the time limit asks the run to stop; the time counts from construction."""

    def __init__(self, max_time: float | None) -> None:
        self._max_time = max_time
        self._deadline = None if max_time is None else time.monotonic() + max_time
        self._signal: signal.Signals | None = None

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Record the first SIGINT or SIGTERM as a request; the second ends the process at once, as by default."""
        previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        is_launched = LAUNCHED in os.environ  # and may get the first signal twice: forwarded, and from Slurm or systemd
        signal.signal(signal.SIGINT, signal.SIG_IGN if is_launched else signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if is_launched else signal.SIG_DFL)

    def exit_code(self) -> int:
        """Return the exit code for the reason to stop; 0 if there is none."""
        if self._signal is not None:
            return SIGNALLED + self._signal
        is_late = self._deadline is not None and time.monotonic() >= self._deadline
        return TIMED_OUT if is_late else 0

    def error(self, code: int, position: str) -> StoppedError:
        """Return the error that ends the run at `position`; `code` may come from another rank."""
        by = f"by {signal.Signals(code - SIGNALLED).name}" if code > SIGNALLED else self._after_time()
        return StoppedError(f"stopped {by} {position}; {RESUME}", code)

    def _after_time(self) -> str:
        return f"after --train.max_time ({self._max_time:g} seconds)"


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether a SIGINT has come; a second one raises KeyboardInterrupt, as by default."""
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, previous)
