"""The most memory that a program has had: of the GPU it computes on, or else resident."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Thread

import torch


def peak_memory_gb() -> float:
    """Return the most memory, in 10^9 bytes, that this process has had."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


@contextmanager
def peak_of_children(interval: float = 0.5) -> Iterator[list[float]]:
    """Give a list whose number becomes the most memory, in 10^9 bytes, that processes started inside have had together.

    What several of them share counts once. It is looked up now and then, since no system keeps the peak of a sum.
    """
    peak, done = [0.0], Event()

    def watch() -> None:
        while not done.wait(interval):
            peak[0] = max(peak[0], sum(map(proportional_gb, multiprocessing.active_children())))

    thread = Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def proportional_gb(process: BaseProcess) -> float:
    """Return the memory of a process in 10^9 bytes, of which it has a share of what others have as well."""
    try:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:  # it has just ended
        return 0.0
    return int(rollup.split("\nPss:")[1].split()[0]) * 1024 / 1e9 if rollup else 0.0
