"""Weights on huge pages, for models that generate on a CPU."""

import mmap
from collections.abc import Iterable
from contextlib import suppress
from itertools import accumulate

import torch
from torch import Tensor, nn

from litlora.cpu.allocator import give_back

ALIGNMENT = 64
"""Bytes of which each weight's place is a multiple: a line of the cache, as everywhere in torch."""


def settle(weights: Iterable[nn.Parameter]) -> None:
    """Move those weights that a CPU has, contiguous and end to end, to huge pages, of which 2 MB are one.

    All of them are read for every token, and an address has to be looked up for each page: in all a sixth of the time.
    """
    moved = [weight for weight in weights if weight.device.type == "cpu"]
    starts = list(accumulate((-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in moved), initial=0))
    room = _room(starts[-1])
    for weight, start in zip(moved, starts, strict=False):
        place = room[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
        weight.data = place.copy_(weight.data)
        give_back()  # or all weights would be in memory twice


def _room(size: int) -> Tensor:
    """Return so many bytes, which only Linux puts on huge pages at a program's request."""
    if not size or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel can be built without
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
