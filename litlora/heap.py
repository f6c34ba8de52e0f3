"""The heap of a CPU's C library, which each pass of a run would leave full of gaps."""

import ctypes
from collections.abc import Callable

from torch import Tensor, nn

EVERY = 10
"""Blocks from one return to the next: fewer take time to fill the same memory again, more leave larger gaps."""

ARENA_MAX = -8  # as glibc's malloc.h numbers it


def share_one() -> None:
    """Have threads that are yet to start share a single heap: gaps in one's own are of no use to another.

    Two lanes would need a quarter more memory with a heap each. Only glibc gives a thread its own.
    """
    if library := _glibc():
        library.mallopt(ARENA_MAX, 1)


def give_back() -> None:
    """Return what is free in the heap to the system, which only glibc can."""
    if library := _glibc():
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library, if it is the one whose heap has arenas and can be trimmed."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None


def spares_memory(quantize: str | None, activation_checkpointing: bool) -> bool:
    """Tell whether a run is to be small before it is fast, so that its blocks are worth keeping small."""
    return quantize is not None or activation_checkpointing


def keep_small(blocks: nn.ModuleList) -> None:
    """Have blocks that train return the gaps of the heap to the system, every few of them, forth and back.

    What a block keeps for its gradient settles in the room of temporaries, so that the next block needs new room for
    its own: after thirty blocks the gaps would be half as large as what is kept, or as large. Only glibc can return
    them, and what is returned takes time to fill again.
    """
    if library := _glibc():
        trim = library.malloc_trim
        for block in blocks[EVERY - 1 :: EVERY]:
            block.register_forward_hook(lambda _block, _inputs, out: _trim_around(out, trim))


def _trim_around(out: Tensor, trim: Callable[[int], int]) -> None:
    """Trim the heap now, and again once there is a gradient of what a block returned."""

    def trim_again(_gradient: Tensor) -> None:
        trim(0)

    if out.requires_grad:
        trim(0)
        out.register_hook(trim_again)  # type: ignore[no-untyped-call]
