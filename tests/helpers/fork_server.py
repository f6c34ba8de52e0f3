"""A process that imports torch once, and forks children per command line: real runs to be killed, without the wait.

A line of stdin is a request: the arguments, the file for stderr, the bytes of address space beyond the present ones
that a child may have, or null, and for each of the children, which run the same command, variables of its environment:
GATE is the file that they wait for before the fourth step, LIMIT the signs of life after which they give one up,
CORES how many threads torch is to have, ANY_RANK lets an adapter be as large as memory has to be for a test, and GROWTH
are the bytes that it may take beside those that it has: --memory says so, and the system refuses 5 % more than that.
PLANLESS leaves --memory out. FRAGMENTATION replaces the measured constants of that name, as a share of activations.
A line with their process ids follows, and one with their exit codes. They show each other more often that they live,
but do not give up sooner.
"""

import json
import os
import resource
import sys
from pathlib import Path

import torch

import litlora.train.setup  # noqa: F401
from litlora.__main__ import main
from litlora.args.finetune import FinetuneLoraArgs
from litlora.cpu import tuning
from litlora.cpu.allocator import SETTINGS, TOP_PAD
from litlora.distributed import heartbeat
from tests.helpers.gate import wait_at

BEAT = 0.2


def limit_memory(headroom: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + headroom, resource.RLIM_INFINITY))


def limit_growth(growth: int) -> str:
    """Let this process grow by `growth` bytes and 5 % of all, and return what it may have as a size.

    --memory is about what is resident, which the system limits for a cgroup alone, and a test has none. It limits data
    as well, which grow as what is resident does (the libraries are there already), but for the unused end of the heap.
    """
    pages = Path("/proc/self/statm").read_text().split()
    resident, data = (int(pages[index]) * resource.getpagesize() for index in (1, 5))
    memory = resident + growth
    most = data + memory * 105 // 100 - resident + SETTINGS[TOP_PAD]
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
    return f"{memory}B"


def run(arguments: list[str], stderr: str, headroom: int | None, variables: dict[str, str]) -> int:
    descriptor = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    heartbeat.BEAT, heartbeat.LIMIT = BEAT, int(variables.get("LIMIT", heartbeat.LIMIT / BEAT))
    if "CORES" in variables:
        torch.set_num_threads(int(variables["CORES"]))
    if "ANY_RANK" in variables:
        FinetuneLoraArgs.check_model = lambda args, _, positions: args.train.sequence_limit(positions)
    if "GATE" in variables:
        wait_at(Path(variables["GATE"]))
    if headroom is not None:
        limit_memory(headroom)
    if "FRAGMENTATION" in variables:
        tuning.FRAGMENTATION, tuning.LEAST_FRAGMENTATION = float(variables["FRAGMENTATION"]), -(10**9)
    if "GROWTH" in variables:
        memory = limit_growth(int(variables["GROWTH"]))
        arguments += [] if "PLANLESS" in variables else ["--memory", memory]
    return main(arguments)


def serve() -> None:
    for line in sys.stdin:
        *command, places = json.loads(line)
        Path(command[1]).write_bytes(b"")
        children: list[int] = []
        for variables in places:
            children.append(os.fork())
            if not children[-1]:
                os._exit(run(*command, variables))
        print(*children, flush=True)
        codes = dict(os.wait() for _ in children)
        print(*(os.waitstatus_to_exitcode(codes[child]) for child in children), flush=True)


if __name__ == "__main__":
    serve()
