"""Starting and monitoring the processes that train, and the rank of each."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from threading import Thread
from types import FrameType

from litlora.cpu.environment import allocator_settings
from litlora.cpu.environment import let_threads_sleep as let_threads_sleep
from litlora.errors import RESUME, EndedElsewhereError, LitLoraError
from litlora.utils.processes import usable_cores
from litlora.utils.signals import LAUNCHED, SIGNALLED, SIGNALS

GRACE_PERIOD = 30.0  # seconds in which ranks end by themselves after one has failed
POLL_INTERVAL = 0.05  # seconds
LOCAL_COUNT = "LOCAL_WORLD_SIZE"  # set by torchrun, and for the processes that are launched here
PIPES = "LITLORA_PIPES"  # of a launched process: one that is closed when the launcher ends, and one for its message
THREADS = "OMP_NUM_THREADS"  # of torch, in each process
PEER_FAILED = 3  # exit code of a launched rank that ends because a peer has; the launcher finds the cause


@dataclass(frozen=True)
class RankInfo:
    """Which of the processes of a run this one is, and how many of them this machine has."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    is_launched: bool = False
    """Whether a launcher of litlora has started all of them and reports why they end."""
    has_own_gpu: bool = False
    """Whether the only visible GPU is this process's own, as srun --gpus-per-task 1 has it."""

    @property
    def nodes(self) -> int:
        return self.world_size // self.local_world_size


def adopt_srun_variables() -> None:
    """Where srun has started several processes, set torchrun's variables for this one."""
    if LOCAL_COUNT in os.environ or os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    names = {"RANK": "PROCID", "LOCAL_RANK": "LOCALID", "WORLD_SIZE": "STEP_NUM_TASKS", "GROUP_RANK": "NODEID"}
    others = ("STEP_TASKS_PER_NODE", "STEP_NODELIST", "JOB_ID", "STEP_ID")
    _require_variables("SLURM_STEP_NUM_TASKS", [f"SLURM_{name}" for name in (*names.values(), *others)])
    per_node = re.fullmatch(r"(\d+)(\(x\d+\))?", os.environ["SLURM_STEP_TASKS_PER_NODE"])
    if per_node is None:
        raise LitLoraError("srun must start as many processes on every node: give it --ntasks-per-node")
    nodes = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", os.environ["SLURM_STEP_NODELIST"])  # the first of each range
    run = os.environ["SLURM_JOB_ID"] + os.environ["SLURM_STEP_ID"]
    rendezvous = {"MASTER_ADDR": nodes.split(",")[0], "MASTER_PORT": f"2{run[-4:]:0>4}"}
    rank_info = {name: os.environ[f"SLURM_{slurm}"] for name, slurm in names.items()}
    os.environ.update(rendezvous | os.environ | rank_info | {LOCAL_COUNT: per_node[1]})


def _require_variables(given: str, needed: Sequence[str]) -> None:
    """Refuse an environment with only some of the variables of torchrun or srun."""
    if missing := [name for name in needed if name not in os.environ]:
        hint = f"start the run by torchrun or srun, which set both, or unset {given}"
        raise LitLoraError(f"the environment has {given}, but not {missing[0]}: {hint}")


def _numbers(names: Sequence[str]) -> Iterator[int]:
    """Yield the variables of torchrun that are numbers."""
    for name in names:
        if not re.fullmatch("[0-9]{1,9}", os.environ[name]):
            raise LitLoraError(f"the environment's {name} ({os.environ[name]}) must be a number, as torchrun sets it")
        yield int(os.environ[name])


def find_rank_info(devices: int, nodes: int) -> RankInfo:
    """Return what torchrun, srun or `launch` has told this process, or refuse a number that was not requested."""
    if LOCAL_COUNT not in os.environ:
        return RankInfo()
    _require_variables(LOCAL_COUNT, ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
    rank, _, world_size, local_world_size = _numbers(["RANK", "LOCAL_RANK", "WORLD_SIZE", LOCAL_COUNT])
    if not rank < world_size or not 0 < local_world_size <= world_size:
        fault = f"RANK ({rank}), WORLD_SIZE ({world_size}) and {LOCAL_COUNT} ({local_world_size}) do not go together"
        raise LitLoraError(f"the environment's {fault}: start the run by torchrun or srun, or unset them")
    by_srun = os.environ.get("SLURM_STEP_NUM_TASKS") == str(world_size)  # and not by a torchrun that srun has started
    info = RankInfo(rank, world_size, local_world_size, is_launched=LAUNCHED in os.environ, has_own_gpu=by_srun)
    requested = ("--devices", devices, info.local_world_size), ("--num_nodes", nodes, info.nodes)
    for flag, number, started in requested:
        if number not in (1, started):
            raise LitLoraError(f"{flag} ({number}) must be 1 or what torchrun or srun was told ({started})")
    return info


def is_launched() -> bool:
    """Tell whether the command line, torchrun or srun has started this process to train."""
    return is_one_of_several() or LAUNCHED in os.environ


def is_one_of_several() -> bool:
    """Tell whether this process trains together with others."""
    return LOCAL_COUNT in os.environ


def processes_to_launch(devices: int, nodes: int, *, dry_run: bool, in_process: bool) -> int:
    """Return how many processes this one is to launch; 0 if it trains itself.

    One that trains on a CPU is launched for its allocator settings, unless the command is a call in a Python program.
    """
    if is_launched():
        return 0
    if nodes > 1 and not dry_run:
        command = f"torchrun --nnodes {nodes} --nproc_per_node {devices} ... -m litlora"
        raise LitLoraError(f"--num_nodes {nodes} needs the command on every node, started by: {command}")
    if devices > 1 and not dry_run:
        return devices
    return int(bool(allocator_settings()) and not in_process)


class Child:
    """A launched process, and the pipe for the sentence by which it reports why it ends."""

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        alive: int,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> None:
        self.messages, write_end = os.pipe()
        pipes = {PIPES: f"{alive},{write_end}"}
        # In a process group of its own: the terminal sends Ctrl-C to the launcher, which forwards it once.
        self.process = subprocess.Popen(
            command,
            env=os.environ | environment | pipes,
            pass_fds=(alive, write_end),
            process_group=0,
            stdout=stdout,
            stderr=stderr,
        )
        os.close(write_end)

    def message(self) -> LitLoraError | None:
        """Return what the process has reported, if anything."""
        os.set_blocking(self.messages, False)
        with suppress(BlockingIOError):
            if report := os.read(self.messages, 2**16):
                return LitLoraError(**json.loads(report))
        return None


def launch(
    command: Sequence[str], count: int, output: int | None = None, ends_early: Callable[[], bool] = lambda: False
) -> int:
    """Run a command in `count` processes that train together, and return 0; report a failure in one sentence.

    None of them reports it itself: their sentences come here, where it is known how the others have ended. What they
    print goes to the descriptor `output`, by default to this process's streams. Once `ends_early` is true, they are
    told to stop, as by SIGTERM.
    """
    settings, port = environment(count), _free_port()
    alive, held = os.pipe()  # `held` closes with this process, however it ends
    with ExitStack() as stack:
        stack.callback(os.close, held)
        stack.callback(os.close, alive)
        ranks = [settings | rank_variables(rank, count, port) for rank in range(count)]
        children = [Child(command, variables, alive, output, output) for variables in ranks]
        for child in children:
            stack.callback(os.close, child.messages)
        processes = [child.process for child in children]
        with forwarding_signals(processes) as forwarded:
            try:
                codes = _wait(processes, ends_early)
            finally:
                for process in processes:
                    process.kill()
                for process in processes:
                    process.wait()
        if any(code != 0 for code in codes):
            message = next(filter(None, (child.message() for child in children)), None)
            raise message or _stopped(forwarded, codes) or _cause(codes)
    return 0


def environment(count: int) -> dict[str, str]:
    """Return the variables that `count` processes should start with: those of the allocator and of OpenMP."""
    let_threads_sleep()
    threads = {THREADS: str(max(1, usable_cores() // count))} if count > 1 and THREADS not in os.environ else {}
    return threads | allocator_settings()


def rank_variables(rank: int, count: int, port: int) -> dict[str, str]:
    """Return the variables by which torchrun, too, tells a process its rank."""
    if count == 1:
        return {LAUNCHED: "1"}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, LOCAL_COUNT: count, "GROUP_RANK": 0}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logging = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # or torch warns, with its stack, that another process has ended
    return {name: str(value) for name, value in (ranks | rendezvous | logging | {LAUNCHED: 1}).items()}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def follow_launcher() -> None:
    """In a launched process, end when the launcher does."""
    if PIPES in os.environ:
        alive, messages = map(int, os.environ[PIPES].split(","))
        os.set_inheritable(messages, False)
        os.set_inheritable(alive, False)
        Thread(target=_end_with_launcher, args=(alive,), daemon=True).start()


def _end_with_launcher(alive: int) -> None:
    os.read(alive, 1)  # returns when no process holds the other end any more
    os._exit(1)


def report_to_launcher(sentence: str, code: int) -> bool:
    """In a launched process, have the launcher report why it ends; elsewhere, return False."""
    if PIPES not in os.environ:
        return False
    _, messages = map(int, os.environ[PIPES].split(","))
    os.write(messages, json.dumps({"message": sentence, "exit_code": code}).encode())
    return True


@contextmanager
def forwarding_signals(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Forward the first SIGINT or SIGTERM as a request, end the processes at the second, and stop and continue with
    them; yield the numbers of the signals that came.

    Slurm and systemd signal each process of a job, the launched ones as well, so that these count one signal only.
    """
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        sent = signal.SIGKILL if received else number
        received.append(number)  # first: a process may answer, and a second signal come, before all have been told
        for process in processes:
            process.send_signal(sent)

    def suspend(_number: int, _: FrameType | None) -> None:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for process in processes:
            process.send_signal(signal.SIGCONT)

    handlers = dict.fromkeys(SIGNALS, forward) | {signal.SIGTSTP: suspend}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield received
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _wait(processes: Sequence[subprocess.Popen[bytes]], ends_early: Callable[[], bool]) -> list[int | None]:
    """Return all exit codes, once all have ended or one was killed, or GRACE_PERIOD after one has failed."""
    deadline, is_told = float("inf"), False
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if None not in codes or any(code < 0 for code in failed) or time.monotonic() > deadline:
            return codes
        if failed:
            deadline = min(deadline, time.monotonic() + GRACE_PERIOD)
        if not is_told and ends_early():
            is_told = True
            for process in processes:
                process.terminate()
        time.sleep(POLL_INTERVAL)


def _stopped(received: Sequence[int], codes: Sequence[int | None]) -> LitLoraError | None:
    """Return the error for processes that a received signal has ended at once, with the exit code that it gives."""
    if len(received) > 1 or any(-code in received for code in codes if code):
        sys.stderr.write("\n")  # for the progress bar, whose process had no time to end its line
        return LitLoraError("stopped", SIGNALLED + received[-1])
    return None


def _cause(codes: Sequence[int | None]) -> LitLoraError:
    """Name the process for which the others have ended, from exit codes alone; None is of one that hangs.

    Those that end because a peer has failed report nothing about the cause.
    """
    if len(codes) == 1 and codes[0] is not None and codes[0] > 0:
        return EndedElsewhereError(codes[0])  # with a traceback
    sys.stderr.write("\n")  # for the progress bar, whose process had no time to end its line
    suspects = {rank: code for rank, code in enumerate(codes) if code not in (0, PEER_FAILED)}
    if not suspects:
        return LitLoraError(f"all ranks have lost contact with one another: {RESUME}")
    rank, code = min(suspects.items(), key=lambda suspect: (suspect[1] is None, suspect[1] or 0))
    if code is None:
        return LitLoraError(f"rank {rank} sends no heartbeat, and the others have ended: {RESUME}")
    if code > 0:
        return LitLoraError(f"rank {rank} has ended with exit code {code}: fix what it reports above, and {RESUME}")
    name = signal.Signals(-code).name
    who, exit_code = (f"rank {rank}", 1) if len(codes) > 1 else ("the training process", SIGNALLED - code)
    return LitLoraError(f"{who} was killed by {name}: was there too little memory? {RESUME.capitalize()}", exit_code)
