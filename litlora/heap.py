"""The heap of a CPU's C library, which each pass of a run would leave full of gaps."""

import ctypes

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
    for block in blocks[EVERY - 1 :: EVERY]:
        block.register_forward_hook(_give_back_around)


def _give_back_around(_block: nn.Module, _inputs: object, out: Tensor) -> None:
    """Return what is free now, and again once there is a gradient of what a block returned."""
    if out.requires_grad:
        give_back()
        out.register_hook(lambda _gradient: give_back())  # type: ignore[no-untyped-call]
