"""Time and memory limits for code that comes with untrusted files: chat templates, regular expressions."""

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

MAX_SECONDS = 10.0
MAX_MEMORY = 1_000_000_000  # bytes beyond what the process already has


@contextmanager
def limited_resources() -> Iterator[None]:
    """Raise TimeoutError or MemoryError if the block exceeds its limits; works in the main thread only."""
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(_limited_time())
            stack.enter_context(limited_memory())
        yield


@contextmanager
def _limited_time() -> Iterator[None]:
    previous = signal.signal(signal.SIGALRM, _time_out)
    # Repeated, because Python drops an exception that a signal handler raises inside a finalizer
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _time_out(number: int, frame: FrameType | None) -> NoReturn:
    raise TimeoutError(f"it takes more than {MAX_SECONDS:g} seconds")


@contextmanager
def limited_memory() -> Iterator[None]:
    """Limit the address space of a block; only Linux reports its current size."""
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    desired = pages * resource.getpagesize() + MAX_MEMORY
    limits = [limit for limit in (desired, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
