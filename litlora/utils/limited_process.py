"""A process for work on what a stranger wrote, killed where that takes too much: no C code can hold out against it."""

import atexit
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import Any

from litlora.utils import resource_limits

START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); runpy.run_module(sys.argv[2], run_name='__main__')"
)
SPARE = 1  # seconds of CPU time beyond the limit that the work itself hears, if it runs no C code
PATIENCE = 60  # seconds of the clock beyond that limit, after which a process that does not answer is killed


class LimitedProcess:
    """A Python module that answers requests, one JSON text a line, in a process with limits on its resources.

    It starts with the first request, and again after one that it did not survive.
    """

    def __init__(self, module: str) -> None:
        self._command = [sys.executable, "-c", START, json.dumps(sys.path), module]
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = Lock()
        atexit.register(self.close)

    def ask(self, request: dict[str, Any]) -> Any:
        """Return the answer to a request; TimeoutError or MemoryError if it takes too much."""
        line = json.dumps({"seconds": resource_limits.MAX_SECONDS, "request": request}, default=str).encode()
        with self._lock:
            try:
                answer = self._exchange(self._started(), line)
            except BaseException:  # also a signal's: the next request would get the answer to this one
                self.close()
                raise
        return json.loads(answer)

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes) -> bytes:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(line + b"\n")
            process.stdin.flush()
        answer = self._answer(process)
        if not answer.endswith(b"\n"):
            raise self._failure(process)
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        """Return the process, which a fork of this one does not share."""
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, process_group=0
            )
            self._owner = os.getpid()
        return self._process

    def _answer(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], PATIENCE + resource_limits.MAX_SECONDS)[0]:
            return b""
        return process.stdout.readline()

    def _failure(self, process: subprocess.Popen[bytes]) -> Exception:
        self.close()
        if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return TimeoutError(f"it takes more than {resource_limits.MAX_SECONDS:g} seconds")
        return MemoryError("it takes too much memory")

    def close(self) -> None:
        """End the process, if it is one of this process."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def serve(answer: Callable[[dict[str, Any]], Any]) -> None:
    """In the process, answer requests until no more come."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with resource_limits.limited_memory():
        for line in sys.stdin.buffer:
            content = json.loads(line)
            resource_limits.MAX_SECONDS = content["seconds"]
            _limit_time(content["seconds"])
            sys.stdout.buffer.write(json.dumps(answer(content["request"])).encode() + b"\n")
            sys.stdout.buffer.flush()


def _limit_time(seconds: float) -> None:
    """Have the kernel kill this process when the next request takes too much CPU time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(usage.ru_utime + usage.ru_stime + seconds) + SPARE
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
