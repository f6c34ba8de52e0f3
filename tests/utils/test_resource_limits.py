import resource
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from litlora.utils import resource_limits
from litlora.utils.resource_limits import bounded


def test_a_block_without_end_is_ended(monkeypatch):
    monkeypatch.setattr(resource_limits, "SECONDS", 0.05)
    with pytest.raises(TimeoutError, match=r"it takes more than 0\.05 seconds"), bounded():
        while True:
            pass


class Endless:
    def __del__(self) -> None:
        while True:
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_block_is_ended_even_if_a_finalizer_takes_the_first_alarm(monkeypatch):
    monkeypatch.setattr(resource_limits, "SECONDS", 0.05)
    with pytest.raises(TimeoutError), bounded():
        Endless()
        while True:
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of the address space")
def test_a_block_that_takes_more_memory_than_it_may_is_ended():
    with pytest.raises(MemoryError), bounded():
        bytes(2 * resource_limits.MEMORY)


def test_afterwards_nothing_is_bounded():
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    with bounded():
        pass
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_another_thread_is_left_alone():
    def enter() -> bool:
        with bounded():
            return signal.getitimer(signal.ITIMER_REAL) == (0, 0)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result()
