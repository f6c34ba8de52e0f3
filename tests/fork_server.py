"""A process that imports torch once, and forks a child per command line: real runs to be killed, without the wait.

A line of stdin is a request: the arguments, the file for stderr, and the bytes of address space beyond the present
ones that the child may have, or null. A line with its process id follows, and one with its exit code.
"""

import json
import os
import resource
import sys
from pathlib import Path

import litlora.commands.finetune_lora  # noqa: F401
from litlora.__main__ import main


def limit_memory(headroom: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + headroom, resource.RLIM_INFINITY))


def run(arguments: list[str], stderr: str, headroom: int | None) -> int:
    descriptor = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    if headroom is not None:
        limit_memory(headroom)
    return main(arguments)


def serve() -> None:
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(run(*json.loads(line)))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
