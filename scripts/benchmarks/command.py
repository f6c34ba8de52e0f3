"""One command of litlora in a process of its own, timed from outside; of any version, since only its flags are used."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environments import NO_GPU, QUIET, ProgramError
from benchmarks.jobs import Device, Job


@dataclass(frozen=True)
class Run:
    """What one command took."""

    seconds: float
    """Of the training steps, or from the first to the last character of the completions."""
    command_seconds: float
    """From the start of the process to its end."""
    memory_gb: float
    """The peak resident memory of the command's largest process."""
    output: str
    """The losses of the steps, or the completions."""


def environment(folder: Path, device: Device) -> dict[str, str]:
    """Return the environment in which Python imports litlora from a folder."""
    return os.environ | QUIET | ({} if device == "cuda" else NO_GPU) | {"PYTHONPATH": str(folder)}


def time_command(flags: Sequence[str], job: Job, folder: Path, python: Path) -> Run:
    """Run `litlora` of a folder in a process of its own, and time what it writes to stdout."""
    log = job.work / "command.log"
    start = time.perf_counter()
    chunks: list[tuple[float, bytes]] = []
    with log.open("wb") as errors:
        command = [str(python), "-m", "litlora", *flags]
        process = subprocess.Popen(
            command, cwd=job.work, env=environment(folder, job.device), stdout=subprocess.PIPE, stderr=errors
        )
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            chunks.append((time.perf_counter(), chunk))
        _, status, usage = os.wait4(process.pid, 0)  # its peak is that of the process and of its children
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdout.close()
    seconds = time.perf_counter() - start
    if process.returncode:
        lines = log.read_text(encoding="utf-8").splitlines()
        raise ProgramError(f"litlora of {folder} fails: {lines[-1] if lines else process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    text = b"".join(chunk for _, chunk in chunks).decode(errors="replace")
    return Run(chunks[-1][0] - chunks[0][0] if chunks else 0.0, seconds, usage.ru_maxrss * unit / 1e9, text)
