"""A pool of threads, each limited to its share of the cores."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")


def worker_count(device: torch.device, asked: int, processes: int = 1) -> int:
    """Return how many lanes, of those asked for, each of so many processes on a machine can have."""
    return min(asked, max(1, torch.get_num_threads() // processes)) if device.type == "cpu" else 1


class WorkerThreads:
    """So many threads, each of which takes one thing at a time: a core that works alone never waits for the others.

    A single lane is the calling thread itself; others know nothing of its torch.no_grad, autocast or contexts.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        share = torch.get_num_threads() // count
        self._pool = ThreadPoolExecutor(count, "lane", torch.set_num_threads, (share,))  # which start when they must

    def map(self, work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
        """Yield what becomes of each item, in their order; few items are taken before they are needed.

        A last one that would be alone has all cores, in the calling thread. What fails is raised when it is its turn,
        and once no lane works any longer.
        """
        items = iter(items)
        ahead: deque[Future[U]] = deque()
        try:
            while group := list(islice(items, self.count)):
                if len(group) == 1:
                    yield from _results(ahead, 0)
                    yield work(group[0])
                    continue
                for item in group:
                    ahead.append(self._pool.submit(work, item))
                    yield from _results(ahead, self.count)
            yield from _results(ahead, 0)
        finally:
            for future in ahead:
                future.cancel()
            wait(ahead)


def _results(ahead: deque[Future[U]], kept: int) -> Iterator[U]:
    """Yield what has become of the first, until no more than so many are ahead."""
    while len(ahead) > kept:
        yield ahead.popleft().result()
