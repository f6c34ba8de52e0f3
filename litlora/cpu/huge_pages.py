"""Weights on huge pages, for models that generate on a CPU."""

import mmap
from collections.abc import Iterable
from contextlib import suppress
from itertools import accumulate

import torch
from torch import Tensor, nn

from litlora.cpu.allocator import give_back

ALIGNMENT = 64
"""Each weight starts at a multiple of this many bytes: a cache line, as everywhere in torch."""


def move_to_huge_pages(weights: Iterable[nn.Parameter]) -> None:
    """Move weights, contiguous and end to end, to huge pages of 2 MB.

    All of them are read for every token, and each page needs an address translation.
    """
    moved = list(dict.fromkeys(weights))
    starts = list(accumulate((-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in moved), initial=0))
    memory = _allocate(starts[-1])
    for weight, start in zip(moved, starts, strict=False):
        target = memory[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
        weight.data = target.copy_(weight.data)
        give_back()  # or all weights would be in memory twice


def _allocate(size: int) -> Tensor:
    """Return a buffer of bytes, on huge pages under Linux, where a program can request them."""
    if not size or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel can be built without
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
