import os
import subprocess
import sys

import pytest

from litlora.cpu import environment
from litlora.cpu.environment import NO_CACHES, SHORT_WAITS, TUNABLES, allocator_settings, let_threads_sleep

GIVEN = "glibc.malloc.mxfast=64"


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """Give a test variables of its own, on a machine without a GPU."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(environment, "GPUS", ())
    for name in (TUNABLES, *environment.SPINNING):
        os.environ.pop(name, None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_allocator_settings_come_before_the_users():
    os.environ[TUNABLES] = GIVEN
    assert allocator_settings() == {TUNABLES: ":".join((*NO_CACHES, GIVEN))}
    os.environ.update(allocator_settings())
    assert allocator_settings() == {}


def test_nothing_is_set_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(environment, "GPUS", ("/dev/null",))
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    assert allocator_settings() == {}
    let_threads_sleep()
    assert not SHORT_WAITS.keys() & os.environ.keys()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # hides it
    let_threads_sleep()
    assert SHORT_WAITS.items() <= os.environ.items()


def test_users_wait_policy_stays():
    os.environ["GOMP_SPINCOUNT"] = "1000"
    let_threads_sleep()
    assert "OMP_WAIT_POLICY" not in os.environ
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


READS = """
import os
from litlora.distributed.launcher import let_threads_sleep
os.environ["OMP_DISPLAY_ENV"] = "verbose"
let_threads_sleep()
import torch
"""


def test_openmp_of_torch_reads_the_wait_policy():
    """What is set in Python before torch is imported must reach the runtime that torch loads."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", READS], env=env, check=True, stderr=subprocess.PIPE, text=True)
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
    assert "GOMP_SPINCOUNT = '3000'" in done.stderr  # the policy would set it to 0
