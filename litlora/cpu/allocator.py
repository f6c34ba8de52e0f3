"""glibc's allocator: settings against fragmentation, and returning free memory to the system."""

import ctypes

ARENA_MAX, MMAP_THRESHOLD, TOP_PAD, TRIM_THRESHOLD = -8, -3, -2, -1  # as glibc's malloc.h numbers them
PASSES = {ARENA_MAX: 1, MMAP_THRESHOLD: 2**25, TOP_PAD: 2**26, TRIM_THRESHOLD: -1}
"""How many heaps there are; from what size on a tensor has pages of its own, the largest that every glibc takes; by how
much a heap grows; and how much of its end may be free, without a limit."""


def configure_for_training() -> None:
    """Suit the heap to passes, each of which takes what the one before it has let go: only glibc's can be told.

    It keeps what is free, has large tensors as well, and grows by much at a time: pages that go back to the system
    come again one by one, each of them zeroed. Threads that are yet to start share it, since gaps in a heap of one's
    own are of no use to another: two lanes would need a quarter more memory.
    """
    if library := _glibc():
        for setting, value in PASSES.items():
            library.mallopt(setting, value)


def give_back() -> None:
    """Return what is free in the heap to the system, which only glibc can."""
    if library := _glibc():
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library, if it is the one whose heap has arenas and can be trimmed."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None
