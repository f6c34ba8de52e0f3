import os

import pytest

from litlora.errors import LitLoraError
from litlora.launching import Place, find_place, heed_srun

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
    assert find_place(8, 4) == Place(9, 32, 8)
    assert os.environ["MASTER_ADDR"] == "gpu07"
    assert os.environ["MASTER_PORT"] == "20710"


def test_unequal_numbers_of_processes_are_refused(srun):
    srun("gpu[07-09]", "8(x2),16")
    with pytest.raises(LitLoraError, match="as many processes on every node"):
        heed_srun()
