import os

import pytest
from helpers.ranks import attempt, tell_threads

from litlora.distributed import launcher
from litlora.distributed.launcher import Place, find_place, heed_srun, start
from litlora.distributed.process_group import _view
from litlora.errors import LitLoraError

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
def test_processes_of_srun_have_their_places_and_meet_on_the_first_node(srun, nodes):
    srun(nodes, "8(x4)")
    heed_srun()
    assert find_place(8, 4) == Place(9, 32, 8, has_own_gpu=True)
    assert os.environ["MASTER_ADDR"] == "gpu07"
    assert os.environ["MASTER_PORT"] == "20710"


def test_unequal_numbers_of_processes_are_refused(srun):
    srun("gpu[07-09]", "8(x2),16")
    with pytest.raises(LitLoraError, match="as many processes on every node"):
        heed_srun()


@pytest.mark.parametrize(("gpus", "expected"), [(1, (1, 32, 0)), (8, (8, 4, 1)), (0, (8, 4, 1))])
def test_a_process_of_srun_that_sees_one_gpu_alone_takes_that(srun, gpus, expected):
    srun("gpu[07-10]", "8(x4)")
    heed_srun()
    devices, nodes, environment = _view(find_place(8, 4), gpus)
    environment.validate_settings(devices, nodes)
    assert (devices, nodes, environment.local_rank()) == expected
    assert environment.global_rank() == 9


def test_fewer_gpus_than_processes_are_refused(srun):
    srun("gpu[07-10]", "8(x4)")
    heed_srun()
    for place, gpus in ((find_place(8, 4), 4), (Place(1, 2, 2), 1)):
        with pytest.raises(LitLoraError, match=f"must be at most the GPUs of this machine \\({gpus}\\)"):
            _view(place, gpus)


HINT = "go on with the same command and --resume true"
KILLED = "rank 1 was killed by SIGKILL: was there too little memory? Go on with the same command and --resume true"
HUNG = f"rank 1 has shown no sign of life, and the others have ended: {HINT}"
ENDED = f"rank 1 has ended with exit code 5: mend what it says above, and {HINT}"
ALONE = f"all ranks have lost the contact to one another: {HINT}"


@pytest.mark.parametrize(
    ("ends", "sentence", "code"),
    [
        (["is left alone", "killed"], KILLED, 1),
        (["hangs", "killed"], KILLED, 1),
        (["ends", "killed"], KILLED, 1),
        (["is left alone", "says why"], "of rank 1", 4),
        (["hangs", "says why"], "of rank 1", 4),
        (["says why", "says why"], "of rank 0", 4),
        (["is left alone", "ends"], ENDED, 1),
        (["hangs", "ends"], ENDED, 1),
        (["is left alone", "hangs"], HUNG, 1),
        (["is left alone", "is left alone"], ALONE, 1),
    ],
)
def test_whatever_becomes_of_the_processes_one_sentence_says_why(monkeypatch, ends, sentence, code):
    monkeypatch.setattr(launcher, "LAST_WORDS", 0.1 if "hangs" in ends else 60)
    with pytest.raises(LitLoraError) as failed:
        start(attempt, ends, 2)
    assert str(failed.value) == sentence
    assert failed.value.exit_code == code


def test_processes_that_all_end_well_leave_nothing_to_say():
    assert start(attempt, ["ends well", "ends well"], 2) == 0


def test_a_process_that_is_started_here_knows_that_it_is_watched(monkeypatch):
    assert not find_place(1, 1).is_watched
    monkeypatch.setattr(os, "environ", os.environ | launcher._environment(1, 2, 1))
    assert find_place(2, 1) == Place(1, 2, 2, is_watched=True)


@pytest.mark.parametrize(("asked", "threads"), [(None, max(1, len(os.sched_getaffinity(0)) // 2)), ("2", 2)])
def test_processes_share_the_cores_unless_told_how_many_threads_to_take(monkeypatch, asked, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    with pytest.raises(LitLoraError, match=f"^{threads} threads$"):
        start(tell_threads, [], 2)
    assert os.environ.get("OMP_NUM_THREADS") == asked
