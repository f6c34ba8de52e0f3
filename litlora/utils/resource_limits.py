"""Time and memory limits for code that comes with untrusted files: chat templates, regular expressions."""

import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar, cast

Result = TypeVar("Result")
POLL_INTERVAL = 0.5  # seconds
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


def within_cpu_time(work: Callable[[], Result], seconds: float) -> Result:
    """Return the result of work in C code that other threads run beside; TimeoutError once it has taken too much.

    The work itself cannot be ended: it continues until the process ends. Its time counts though it ends before that is
    looked at.
    """
    results: list[tuple[Result | None, BaseException | None]] = []
    thread = threading.Thread(target=_run, args=(work, results), daemon=True)
    limit = time.process_time() + seconds
    thread.start()
    while True:
        thread.join(min(seconds, POLL_INTERVAL))
        if time.process_time() > limit:
            raise TimeoutError(f"it takes more than {seconds:,.0f} seconds")
        if not thread.is_alive():
            break
    result, error = results[0]
    if error is not None:
        raise error
    return cast(Result, result)


def _run(work: Callable[[], Result], results: list[tuple[Result | None, BaseException | None]]) -> None:
    try:
        results.append((work(), None))
    except BaseException as error:  # also a panic of Rust
        results.append((None, error))


@contextmanager
def limited_file_size(most: int) -> Iterator[None]:
    """Let no file that the block writes grow beyond a number of bytes: OSError then, also where C code writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = [limit for limit in (most, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
