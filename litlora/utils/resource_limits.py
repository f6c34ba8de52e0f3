"""Time and memory limits for untrusted input: chat templates, patterns."""

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

SECONDS = 10.0
MEMORY = 1_000_000_000  # bytes, beyond what the process has


@contextmanager
def bounded() -> Iterator[None]:
    """Raise TimeoutError or MemoryError where the block takes too much; only the main thread can be held to it."""
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(_time())
            stack.enter_context(_memory())
        yield


@contextmanager
def _time() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, _too_late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)  # again, for Python drops what a finalizer raises
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _too_late(number: int, frame: FrameType | None) -> NoReturn:
    raise TimeoutError(f"it takes more than {SECONDS:g} seconds")


@contextmanager
def _memory() -> Iterator[None]:
    """Bound the address space, which nothing but Linux tells."""
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + MEMORY
    limits = [limit for limit in (most, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
