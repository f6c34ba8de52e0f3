import time
from itertools import count, islice
from threading import Barrier, Event, current_thread, main_thread

import pytest
import torch

from litlora.cpu.worker_threads import WorkerThreads, worker_count

pytestmark = pytest.mark.usefixtures("four_threads")


def test_results_are_in_the_order_of_the_items():
    done, second_is_done = [], Event()

    def work(item: int) -> int:
        if item == 0:
            assert second_is_done.wait(30)
        done.append(item)
        if item == 1:
            second_is_done.set()
        return item

    assert list(WorkerThreads(2).map(work, range(5))) == list(range(5))
    assert done[0] == 1


def test_workers_are_concurrent_on_equal_shares_of_the_cores():
    barrier = Barrier(2, timeout=30)  # which needs two threads

    def work(_: int) -> int:
        barrier.wait()
        return torch.get_num_threads()

    assert list(WorkerThreads(2).map(work, range(6))) == [2] * 6
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(("workers", "items", "in_workers"), [(1, 3, 0), (2, 1, 0), (2, 5, 4), (2, 4, 4), (4, 9, 8)])
def test_leftover_item_uses_all_cores_in_the_calling_thread(workers, items, in_workers):
    at_work = []

    def work(item: int) -> tuple[bool, int, list[int]]:
        at_work.append(item)
        time.sleep(0.02)
        others = at_work.copy()
        at_work.remove(item)
        return current_thread() is main_thread(), torch.get_num_threads(), others

    actual = list(WorkerThreads(workers).map(work, range(items)))
    assert [share for *share, _ in actual[:in_workers]] == [[False, 4 // workers]] * in_workers
    assert actual[in_workers:] == [(True, 4, [item]) for item in range(in_workers, items)]


@pytest.mark.parametrize("workers", [1, 2])
def test_few_items_are_taken_ahead(workers):
    source = count()
    assert list(islice(WorkerThreads(workers).map(str, source), 10)) == list("0123456789")
    assert next(source) <= 13


def test_failure_is_raised_once_all_workers_have_stopped():
    at_work = []

    def work(item: int) -> int:
        at_work.append(item)
        time.sleep(0.05 * item)
        at_work.remove(item)
        if item == 1:
            raise MemoryError
        return item

    results = WorkerThreads(2).map(work, range(5))
    assert next(results) == 0
    with pytest.raises(MemoryError):
        next(results)
    assert not at_work
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(("requested", "processes", "workers"), [(2, 1, 2), (9, 1, 4), (2, 4, 1), (2, 8, 1)])
def test_no_more_workers_than_cores(requested, processes, workers):
    assert worker_count(requested, processes) == workers
