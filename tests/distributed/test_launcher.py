import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
from helpers.processes import children, state, wait_until_handled

from litlora.cpu.environment import TUNABLES, allocator_settings, has_gpu
from litlora.distributed import launcher
from litlora.distributed.launcher import (
    RankInfo,
    adopt_srun_variables,
    find_rank_info,
    launch,
    processes_to_launch,
)
from litlora.distributed.process_group import _visible_devices
from litlora.errors import RESUME, EndedElsewhereError, LitLoraError

TASK = {"PROCID": "9", "LOCALID": "1", "NODEID": "1", "JOB_ID": "71", "STEP_ID": "0", "STEP_NUM_TASKS": "32"}


@pytest.fixture
def srun(monkeypatch):
    """Return a function that makes this process one that srun has started."""

    def start(nodes: str, per_node: str) -> None:
        monkeypatch.setattr(os, "environ", os.environ.copy())
        os.environ.update({f"SLURM_{name}": value for name, value in TASK.items()})
        os.environ.update(SLURM_STEP_NODELIST=nodes, SLURM_STEP_TASKS_PER_NODE=per_node)

    return start


@pytest.mark.parametrize("nodes", ["gpu07,gpu09", "gpu[07-09,12]", "gpu[07,09]", "gpu07", "gpu07,x[1-2]n[3-4]"])
def test_srun_processes_have_ranks_and_meet_on_the_first_node(srun, nodes):
    srun(nodes, "8(x4)")
    adopt_srun_variables()
    assert find_rank_info(8, 4) == RankInfo(9, 32, 8, has_own_gpu=True)
    assert os.environ["MASTER_ADDR"] == "gpu07"
    assert os.environ["MASTER_PORT"] == "20710"


def test_unequal_processes_per_node_are_refused(srun):
    srun("gpu[07-09]", "8(x2),16")
    with pytest.raises(LitLoraError, match="as many processes on every node"):
        adopt_srun_variables()


TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"RANK": None}, "has LOCAL_WORLD_SIZE, but not RANK: start the run by torchrun or srun"),
        ({"MASTER_ADDR": None}, "has LOCAL_WORLD_SIZE, but not MASTER_ADDR"),
        ({"LOCAL_WORLD_SIZE": "abc"}, "LOCAL_WORLD_SIZE .abc. must be a number, as torchrun sets it"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE .0. do not go together"),
        ({"RANK": "2"}, "RANK .2., WORLD_SIZE .2."),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE .-2. must be a number"),
    ],
)
def test_half_set_variables_of_torchrun_are_one_sentence(monkeypatch, changes, fault):
    given = {name: value for name, value in (TORCHRUN | changes).items() if value is not None}
    others = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    monkeypatch.setattr(os, "environ", others | given)
    with pytest.raises(LitLoraError, match=fault):
        find_rank_info(1, 1)


def test_half_set_variables_of_srun_are_one_sentence(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ | {"SLURM_STEP_NUM_TASKS": "2"})
    with pytest.raises(LitLoraError, match=r"^the environment has SLURM_STEP_NUM_TASKS, but not SLURM_PROCID: start "):
        adopt_srun_variables()


@pytest.mark.parametrize(("gpus", "expected"), [(1, (1, 32, 0)), (8, (8, 4, 1)), (0, (8, 4, 1))])
def test_srun_process_takes_its_only_visible_gpu(srun, gpus, expected):
    srun("gpu[07-10]", "8(x4)")
    adopt_srun_variables()
    devices, nodes, environment = _visible_devices(find_rank_info(8, 4), gpus)
    environment.validate_settings(devices, nodes)
    assert (devices, nodes, environment.local_rank()) == expected
    assert environment.global_rank() == 9


def test_fewer_gpus_than_processes_are_refused(srun):
    srun("gpu[07-10]", "8(x4)")
    adopt_srun_variables()
    for rank_info, gpus in ((find_rank_info(8, 4), 4), (RankInfo(1, 2, 2), 1)):
        with pytest.raises(LitLoraError, match=f"must be at most the GPUs of this machine \\({gpus}\\)"):
            _visible_devices(rank_info, gpus)


CHILD = """
import json, os, signal, sys, time
from litlora.distributed.launcher import PEER_FAILED, follow_launcher, report_to_launcher

follow_launcher()
rank = int(os.environ.get("RANK", 0))
end = sys.argv[1 + rank]
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
while end == "hangs":
    time.sleep(1)
if end == "reports":
    report_to_launcher(f"of rank {rank}", 4)
sys.exit({"succeeds": 0, "fails": 5, "peer failed": PEER_FAILED, "reports": 4}[end])
"""


def run(*ends: str, program: str = CHILD) -> int:
    """Launch a process for each of these words, which it ends by."""
    return launch([sys.executable, "-c", program, *ends], len(ends))


KILLED = f"was killed by SIGKILL: was there too little memory? {RESUME.capitalize()}"
HUNG = f"rank 1 sends no heartbeat, and the others have ended: {RESUME}"
FAILED = f"rank 1 has ended with exit code 5: fix what it reports above, and {RESUME}"
ALONE = f"all ranks have lost contact with one another: {RESUME}"


@pytest.mark.parametrize(
    ("ends", "sentence", "code"),
    [
        (["peer failed", "killed"], f"rank 1 {KILLED}", 1),
        (["hangs", "killed"], f"rank 1 {KILLED}", 1),
        (["fails", "killed"], f"rank 1 {KILLED}", 1),
        (["peer failed", "reports"], "of rank 1", 4),
        (["hangs", "reports"], "of rank 1", 4),
        (["reports", "reports"], "of rank 0", 4),
        (["peer failed", "fails"], FAILED, 1),
        (["hangs", "fails"], FAILED, 1),
        (["peer failed", "hangs"], HUNG, 1),
        (["peer failed", "peer failed"], ALONE, 1),
        (["killed"], f"the training process {KILLED}", 128 + signal.SIGKILL),
        (["reports"], "of rank 0", 4),
    ],
)
def test_launcher_reports_any_failure_in_one_sentence(monkeypatch, ends, sentence, code):
    monkeypatch.setattr(launcher, "GRACE_PERIOD", 0.1 if "hangs" in ends else 60)
    with pytest.raises(LitLoraError) as failed:
        run(*ends)
    assert str(failed.value) == sentence
    assert failed.value.exit_code == code


def test_launcher_passes_on_the_exit_code_of_a_traceback():
    with pytest.raises(EndedElsewhereError) as failed:
        run("fails")
    assert failed.value.exit_code == 5


def test_launcher_returns_0_when_all_ranks_succeed():
    assert run("succeeds", "succeeds") == run("succeeds") == 0


def test_launched_process_knows_its_rank(monkeypatch):
    assert not find_rank_info(1, 1).is_launched
    monkeypatch.setattr(os, "environ", os.environ | launcher.rank_variables(1, 2, 1))
    assert find_rank_info(2, 1) == RankInfo(1, 2, 2, is_launched=True)


THREADS = """
import os
from litlora.distributed.launcher import report_to_launcher
report_to_launcher(f"{os.environ['OMP_NUM_THREADS']} threads, wait {os.environ.get('OMP_WAIT_POLICY')}", 1)
raise SystemExit(1)
"""


@pytest.mark.parametrize(("given", "threads"), [(None, max(1, len(os.sched_getaffinity(0)) // 2)), ("2", 2)])
def test_ranks_share_the_cores_unless_threads_are_given(monkeypatch, given, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    with pytest.raises(LitLoraError, match=f"^{threads} threads, wait active$"):
        run("", "", program=THREADS)
    assert os.environ.get("OMP_NUM_THREADS") == given


WAITS = """
import signal, sys, time
if sys.argv[1] == "ignores":
    signal.signal(signal.SIGTERM, lambda *_: print("ignored", flush=True))
print("ready", flush=True)
time.sleep(60)
"""
LAUNCHER = """
import sys
from litlora.distributed.launcher import launch
from litlora.errors import LitLoraError
try:
    launch([sys.executable, "-c", *sys.argv[1:]], 1)
except LitLoraError as error:
    sys.exit(f"{error.exit_code} {error}")
"""


@pytest.mark.parametrize(("reaction", "signals"), [("ends", 1), ("ignores", 2)])
def test_second_signal_ends_a_launched_process_at_once(reaction, signals):
    command = [sys.executable, "-c", LAUNCHER, WAITS, reaction]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        wait_until_handled(signal.SIGTERM, parent.pid)
        (child,) = children(parent.pid)
        for sent in range(signals):
            assert sent == 0 or parent.stdout.readline() == "ignored\n"
            parent.send_signal(signal.SIGTERM)
        assert parent.communicate()[1].strip() == f"{128 + signal.SIGTERM} stopped"
    assert not Path(f"/proc/{child}").exists()


def test_second_signal_ends_processes_though_it_comes_while_the_first_is_forwarded():
    class Answering:
        """A process that answers at once, and is sent the next signal for that."""

        sent: ClassVar[list[int]] = []

        def send_signal(self, number: int) -> None:
            self.sent.append(number)
            if len(self.sent) == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    with launcher.forwarding_signals([Answering()]) as received:
        os.kill(os.getpid(), signal.SIGTERM)
    assert Answering.sent == [signal.SIGTERM, signal.SIGKILL]
    assert received == [signal.SIGTERM, signal.SIGTERM]


def test_suspending_the_launcher_suspends_what_it_launched():
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, WAITS, "ends"], stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"ready\n"
        wait_until_handled(signal.SIGTSTP, parent.pid)
        (child,) = children(parent.pid)
        for number, states in ((signal.SIGTSTP, "T"), (signal.SIGCONT, "SR")):
            parent.send_signal(number)
            while not all(state(process) in states for process in (parent.pid, child)):
                time.sleep(0.01)
        parent.kill()
        os.kill(child, signal.SIGKILL)  # it is no litlora process, which would end with its launcher


@pytest.mark.skipif(has_gpu() or not allocator_settings(), reason="trains in the process itself")
def test_only_the_command_line_launches_a_process_for_one_device(monkeypatch):
    monkeypatch.delenv(TUNABLES, raising=False)
    assert processes_to_launch(1, 1, dry_run=False, in_process=False) == 1
    assert processes_to_launch(1, 1, dry_run=True, in_process=False) == 1
    assert processes_to_launch(1, 1, dry_run=False, in_process=True) == 0
    assert processes_to_launch(2, 1, dry_run=False, in_process=True) == 2
    for variable in ("LOCAL_WORLD_SIZE", "LITLORA_LAUNCHED"):
        with monkeypatch.context() as context:
            context.setenv(variable, "1")
            assert processes_to_launch(1, 1, dry_run=False, in_process=False) == 0
    monkeypatch.setenv(TUNABLES, allocator_settings()[TUNABLES])
    assert processes_to_launch(1, 1, dry_run=False, in_process=False) == 0
