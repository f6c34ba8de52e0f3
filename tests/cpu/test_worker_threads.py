import time
from itertools import count, islice
from threading import Barrier, current_thread, main_thread

import pytest
import torch

from litlora.cpu.worker_threads import WorkerThreads, worker_count

pytestmark = pytest.mark.usefixtures("four_threads")


def test_results_come_in_the_order_of_the_items_whichever_is_done_first():
    done = []

    def work(delay: int) -> int:
        time.sleep(delay / 50)
        done.append(delay)
        return delay

    items = [3, 0, 2, 1, 0]
    assert list(WorkerThreads(2).map(work, items)) == items != done


def test_as_many_work_at_a_time_as_there_are_lanes_each_on_its_share_of_the_cores():
    together = Barrier(2, timeout=30)  # which nobody passes alone

    def work(_: int) -> int:
        together.wait()
        return torch.get_num_threads()

    assert list(WorkerThreads(2).map(work, range(6))) == [2] * 6
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(("lanes", "items", "in_lanes"), [(1, 3, 0), (2, 1, 0), (2, 5, 4), (2, 4, 4), (4, 9, 8)])
def test_what_is_alone_has_all_cores_of_the_calling_thread(lanes, items, in_lanes):
    at_work = []

    def work(item: int) -> tuple[bool, int, list[int]]:
        at_work.append(item)
        time.sleep(0.02)
        others = at_work.copy()
        at_work.remove(item)
        return current_thread() is main_thread(), torch.get_num_threads(), others

    found = list(WorkerThreads(lanes).map(work, range(items)))
    assert [share for *share, _ in found[:in_lanes]] == [[False, 4 // lanes]] * in_lanes
    assert found[in_lanes:] == [(True, 4, [item]) for item in range(in_lanes, items)]


@pytest.mark.parametrize("lanes", [1, 2])
def test_few_items_are_taken_before_they_are_needed(lanes):
    source = count()
    assert list(islice(WorkerThreads(lanes).map(str, source), 10)) == list("0123456789")
    assert next(source) <= 13


def test_a_failure_is_raised_in_its_turn_and_once_no_lane_works_any_longer():
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


@pytest.mark.parametrize(
    ("device", "asked", "processes", "lanes"),
    [("cpu", 2, 1, 2), ("cpu", 9, 1, 4), ("cpu", 2, 4, 1), ("cpu", 2, 8, 1), ("cuda", 2, 1, 1)],
)
def test_there_are_no_more_lanes_than_cores_and_one_on_a_gpu(device, asked, processes, lanes):
    assert worker_count(torch.device(device), asked, processes) == lanes
