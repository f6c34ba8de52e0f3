"""Starting and watching the processes that train together, and the rank of each."""

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from threading import Thread
from types import FrameType

from litlora.errors import LitLoraError
from litlora.utils.processes import exit_with_parent, usable_cores
from litlora.utils.signals import SIGNALS

LAST_WORDS = 30.0  # seconds in which the others end by themselves after one has failed
LOCAL_COUNT = "LOCAL_WORLD_SIZE"  # set by torchrun, and for the processes that are started here
WATCHED = "LITLORA_WATCHED"  # set for the processes that are started here
THREADS = "OMP_NUM_THREADS"  # of torch, in each process
LEFT_ALONE = 3  # exit code of a watched process that ends because another has, of which the watching one knows more

Attempt = Callable[[Sequence[str]], tuple[int, str | None]]
"""Runs a command, and returns its exit code and the sentence that is to be said, if any."""


@dataclass(frozen=True)
class Place:
    """Which of the processes of a run this one is, and how many of them this machine has."""

    rank: int = 0
    count: int = 1
    local_count: int = 1
    is_watched: bool = False
    """Whether the process that has started all of them says why they end."""
    has_own_gpu: bool = False
    """Whether a GPU that is the only one in sight is this process's own, as srun --gpus-per-task 1 has it."""

    @property
    def nodes(self) -> int:
        return self.count // self.local_count


def heed_srun() -> None:
    """Where srun has started this process among others, say so by the variables of torchrun."""
    if LOCAL_COUNT in os.environ or os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    per_node = re.fullmatch(r"(\d+)(\(x\d+\))?", os.environ["SLURM_STEP_TASKS_PER_NODE"])
    if per_node is None:
        raise LitLoraError("srun must start as many processes on every node: give it --ntasks-per-node")
    names = {"RANK": "PROCID", "LOCAL_RANK": "LOCALID", "WORLD_SIZE": "STEP_NUM_TASKS", "GROUP_RANK": "NODEID"}
    nodes = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", os.environ["SLURM_STEP_NODELIST"])  # the first of each range
    run = os.environ["SLURM_JOB_ID"] + os.environ["SLURM_STEP_ID"]
    meeting = {"MASTER_ADDR": nodes.split(",")[0], "MASTER_PORT": f"2{run[-4:]:0>4}"}
    place = {name: os.environ[f"SLURM_{slurm}"] for name, slurm in names.items()}
    os.environ.update(meeting | os.environ | place | {LOCAL_COUNT: per_node[1]})


def find_place(devices: int, nodes: int) -> Place:
    """Return the place that torchrun, srun or `start` has given this process, or refuse one that was not asked for."""
    if LOCAL_COUNT not in os.environ:
        return Place()
    rank, count, local_count = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", LOCAL_COUNT))
    by_srun = os.environ.get("SLURM_STEP_NUM_TASKS") == str(count)  # and not by a torchrun that srun has started
    place = Place(rank, count, local_count, is_watched=WATCHED in os.environ, has_own_gpu=by_srun)
    asked = ("--devices", devices, place.local_count), ("--num_nodes", nodes, place.nodes)
    for flag, wanted, started in asked:
        if wanted not in (1, started):
            raise LitLoraError(f"{flag} ({wanted}) must be 1 or what torchrun or srun was told ({started})")
    return place


def must_start(devices: int, nodes: int, dry_run: bool) -> bool:
    """Tell whether this process is to start those that train, instead of being one of them."""
    if LOCAL_COUNT in os.environ or dry_run:
        return False
    if nodes > 1:
        command = f"torchrun --nnodes {nodes} --nproc_per_node {devices} ... -m litlora"
        raise LitLoraError(f"--num_nodes {nodes} needs the command on every node, started by: {command}")
    return devices > 1


def start(attempt: Attempt, arguments: Sequence[str], count: int) -> int:
    """Run a command in processes that train together, and return 0; if it fails, one sentence says why.

    None of them says it itself: what they have to say comes here, where all is known that became of the others.
    """
    context, port = multiprocessing.get_context("spawn"), _free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_run, args=(attempt, arguments, _environment(rank, count, port), words))
        for rank, (_, words) in enumerate(pipes)
    ]
    with _sharing_cores(count):
        for process in processes:
            process.start()
    with _passing_signals(processes):
        try:
            codes = _watch(processes)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
    if any(code != 0 for code in codes):
        raise _said(pipes) or _cause(codes)
    return 0


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    """Return the variables by which torchrun, too, tells a process its place."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, LOCAL_COUNT: count, "GROUP_RANK": 0}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    silence = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # or torch warns, with its stack, that another process has ended
    return {name: str(value) for name, value in (place | meeting | silence | {WATCHED: 1}).items()}


@contextmanager
def _sharing_cores(count: int) -> Iterator[None]:
    """Have processes that are started inside take a share of the cores each, or all would take them from one another.

    They are told before they import anything: once torch is there, it is too late.
    """
    asked = os.environ.get(THREADS)
    os.environ[THREADS] = asked or str(max(1, usable_cores() // count))
    try:
        yield
    finally:
        if not asked:
            del os.environ[THREADS]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _run(attempt: Attempt, arguments: Sequence[str], environment: dict[str, str], words: Connection) -> None:
    os.setpgrp()  # Ctrl-C is for the parent, which passes it on once
    Thread(target=exit_with_parent, daemon=True).start()
    os.environ.update(environment)
    code, sentence = attempt(arguments)
    if sentence is not None:
        words.send((sentence, code))
    raise SystemExit(code)


@contextmanager
def _passing_signals(processes: Sequence[SpawnProcess]) -> Iterator[None]:
    def pass_on(number: int, _: FrameType | None) -> None:
        for process in processes:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(processes: Sequence[SpawnProcess]) -> list[int | None]:
    """Return all exit codes, once all have ended or one was killed; or those there are a while after one has failed."""
    deadline = float("inf")
    while True:
        codes = [process.exitcode for process in processes]
        failed = [code for code in codes if code]
        if None not in codes or any(code < 0 for code in failed) or time.monotonic() > deadline:
            return codes
        if failed:
            deadline = min(deadline, time.monotonic() + LAST_WORDS)
        running = [process.sentinel for process, code in zip(processes, codes, strict=True) if code is None]
        wait(running, timeout=1 if failed else None)


def _said(pipes: Sequence[tuple[Connection, Connection]]) -> LitLoraError | None:
    """Return what the first process that has something to say has said."""
    return next((LitLoraError(*words.recv()) for words, _ in pipes if words.poll()), None)


def _cause(codes: Sequence[int | None]) -> LitLoraError:
    """Say what became of the process for which the others have ended, from exit codes alone; None is of one that hangs.

    Those that were left alone by it say nothing of the cause.
    """
    sys.stderr.write("\n")  # for the progress bar, whose process had no time to end its line
    suspects = {rank: code for rank, code in enumerate(codes) if code not in (0, LEFT_ALONE)}
    hint = "go on with the same command and --resume true"
    if not suspects:
        return LitLoraError(f"all ranks have lost the contact to one another: {hint}")
    rank, code = min(suspects.items(), key=lambda suspect: (suspect[1] is None, suspect[1] or 0))
    if code is None:
        return LitLoraError(f"rank {rank} has shown no sign of life, and the others have ended: {hint}")
    if code > 0:
        return LitLoraError(f"rank {rank} has ended with exit code {code}: mend what it says above, and {hint}")
    name = signal.Signals(-code).name
    return LitLoraError(f"rank {rank} was killed by {name}: was there too little memory? {hint.capitalize()}")
