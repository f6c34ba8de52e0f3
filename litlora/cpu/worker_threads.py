"""A pool of threads, each limited to its share of the cores."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")


def worker_count(requested: int, processes: int = 1) -> int:
    """Return how many threads, of those requested, each of `processes` on a machine runs concurrently."""
    return min(requested, max(1, torch.get_num_threads() // processes))


class WorkerThreads:
    """A pool of threads, each limited to its share of the cores, so that no core waits for another after each product.

    A single worker is the calling thread itself; others have neither its torch.no_grad nor autocast nor contexts.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        share = torch.get_num_threads() // count
        self._pool = ThreadPoolExecutor(count, "worker", torch.set_num_threads, (share,))  # which start on demand

    def map(self, work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
        """Yield the result for each item, in their order; few items are taken before they are needed.

        A leftover item uses all cores, in the calling thread. A failure is raised in its turn, once all workers have
        stopped.
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


def _results(ahead: deque[Future[U]], limit: int) -> Iterator[U]:
    """Yield the first results, until no more than `limit` are pending."""
    while len(ahead) > limit:
        yield ahead.popleft().result()
