"""What ends a run before its last step: a signal, or the time it may take."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from litlora.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
OUT_OF_TIME = 124  # as of timeout(1); a signal's code is 128 and its number


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

    def reason(self) -> str | None:
        """Say what asks the run to stop, if anything does."""
        if self._signal is not None:
            return f"stopped by {self._signal.name}"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"stopped after --train.max_time ({self._max_time:g} seconds)"
        return None

    def stopped(self, where: str) -> StoppedError:
        """Return what ends the run, with the code that belongs to the reason."""
        code = OUT_OF_TIME if self._signal is None else 128 + self._signal
        return StoppedError(f"{self.reason()} {where}; go on with the same command and --resume true", code)
