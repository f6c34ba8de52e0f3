"""What Linux tells about a process: its state, its children, and the signals that it handles."""

import re
import time
from pathlib import Path


def state(process: int) -> str:
    """Return the letter of a process's state; "Z" once it has ended, though its exit code may not have been read."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):  # gone before its file was opened, or before it was read
        return "Z"


def is_running(process: int) -> bool:
    return state(process) != "Z"


def children(process: int) -> list[int]:
    """Return the processes that a process has started, in their order."""
    return sorted(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def wait_until_handled(number: int, process: int) -> None:
    """Return once a process handles a signal: what it has launched may be ready before."""
    while not _handles(number, process):
        time.sleep(0.005)


def wait_until_received(number: int, process: int) -> None:
    """Return once a process that handles the first signal only has received it."""
    while _handles(number, process):
        time.sleep(0.005)


def _handles(number: int, process: int) -> bool:
    mask = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{process}/status").read_text())
    return bool(int(mask[1], 16) >> (number - 1) & 1)
