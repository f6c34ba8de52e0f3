import resource
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from litlora.utils import resource_limits
from litlora.utils.resource_limits import limited_resources


def test_endless_block_times_out(monkeypatch):
    monkeypatch.setattr(resource_limits, "MAX_SECONDS", 0.05)
    with pytest.raises(TimeoutError, match=r"it takes more than 0\.05 seconds"), limited_resources():
        while True:
            pass


class Endless:
    def __del__(self) -> None:
        while True:
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_timeout_survives_a_finalizer(monkeypatch):
    """Python drops the TimeoutError that is raised inside a finalizer; the next alarm raises another one."""
    monkeypatch.setattr(resource_limits, "MAX_SECONDS", 0.05)
    with pytest.raises(TimeoutError), limited_resources():
        Endless()
        while True:
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of the address space")
def test_block_above_the_memory_limit_fails():
    with pytest.raises(MemoryError), limited_resources():
        bytes(2 * resource_limits.MAX_MEMORY)


def test_limits_are_restored():
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    with limited_resources():
        pass
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_only_the_main_thread_is_limited():
    def timer_is_off() -> bool:
        with limited_resources():
            return signal.getitimer(signal.ITIMER_REAL) == (0, 0)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(timer_is_off).result()
