"""Where a CPU has the weights of a model that generates."""

import mmap
from collections.abc import Iterable
from contextlib import suppress
from itertools import accumulate

import torch
from torch import nn

from litlora.heap import give_back

ALIGNMENT = 64
"""Bytes of which each weight's place is a multiple: a line of the cache, as everywhere in torch."""


def settle(weights: Iterable[nn.Parameter]) -> None:
    """Move those weights that a CPU has end to end on huge pages, of which 2 MB are one.

    All of them are read for every token, and an address has to be looked up for each page: in all a sixth of the time.
    Only Linux gives such pages at a program's request; without them the weights lie as well as before.
    """
    moved = [weight for weight in weights if weight.device.type == "cpu"]
    if not moved or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    starts = list(accumulate((-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in moved), initial=0))
    pages = mmap.mmap(-1, starts[-1], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel can be built without
        pages.madvise(mmap.MADV_HUGEPAGE)
    for weight, start in zip(moved, starts, strict=False):
        place = torch.frombuffer(pages, dtype=weight.dtype, count=weight.numel(), offset=start)
        weight.data = place.view(weight.shape).copy_(weight.data)
        give_back()  # or all weights would be in memory twice
