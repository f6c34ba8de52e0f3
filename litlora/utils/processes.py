"""Child processes and the cores that they may use."""

import multiprocessing
import os
import sys


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def exit_with_parent() -> None:
    """Block until the parent process ends, then exit this one; meant for a daemon thread."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
