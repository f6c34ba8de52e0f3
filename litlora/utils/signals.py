"""Stopping a run early: signals and the time limit."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from litlora.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
OUT_OF_TIME = 124  # as of timeout(1)
SIGNALLED = 128  # and the signal's number


class Stopping:
    """Whether the run has been told to stop; its time counts from here on."""

    def __init__(self, max_time: float | None) -> None:
        self._max_time = max_time
        self._deadline = None if max_time is None else time.monotonic() + max_time
        self._signal: signal.Signals | None = None

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Take the first SIGINT or SIGTERM as a request; the second does what it does elsewhere, at once."""
        before = {number: signal.signal(number, self._request) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def code(self) -> int:
        """Return the exit code of what asks the run to stop; 0 if nothing does."""
        if self._signal is not None:
            return SIGNALLED + self._signal
        is_late = self._deadline is not None and time.monotonic() >= self._deadline
        return OUT_OF_TIME if is_late else 0

    def stopped(self, code: int, where: str) -> StoppedError:
        """Return what ends the run, for the reason that this process or another has the code of."""
        by = f"by {signal.Signals(code - SIGNALLED).name}" if code > SIGNALLED else self._after_time()
        return StoppedError(f"stopped {by} {where}; go on with the same command and --resume true", code)

    def _after_time(self) -> str:
        return f"after --train.max_time ({self._max_time:g} seconds)"
