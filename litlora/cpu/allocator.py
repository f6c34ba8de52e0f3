"""glibc's allocator: settings against fragmentation, and returning free memory to the system."""

import ctypes

ARENA_MAX, MMAP_THRESHOLD, TOP_PAD, TRIM_THRESHOLD = -8, -3, -2, -1  # as glibc's malloc.h numbers them
SETTINGS = {ARENA_MAX: 1, MMAP_THRESHOLD: 2**25, TOP_PAD: 2**26, TRIM_THRESHOLD: -1}
"""The number of arenas; the size from which tensors get pages of their own (the largest that glibc accepts); by how
much the heap grows; and how much free memory at its end is returned to the system: none."""
TIGHT = {MMAP_THRESHOLD: 2**21}
"""What is set otherwise where memory is short: what the heap has no room for gets pages of its own from here on."""


def configure_for_training(*, tight: bool = False) -> None:
    """Set glibc's allocator for steps that each reuse the memory which the one before has freed.

    It retains freed memory, holds large tensors as well, and grows in large increments: pages that are returned to the
    system are zeroed one by one when they come back. All threads share one arena, as free memory in one is not used by
    another: two worker threads would need a quarter more memory.

    How much of the heap lies idle between what is in use differs from one run to the next, by a fifth of the
    activations of a long sequence. Where memory is `tight`, medium tensors get pages of their own too: peaks are lower
    and hardly differ, but the pages have to be zeroed.
    """
    if library := _glibc():
        for setting, value in (SETTINGS | (TIGHT if tight else {})).items():
            library.mallopt(setting, value)


def give_back() -> None:
    """Return free memory to the system, if the allocator is glibc's."""
    if library := _glibc():
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library, if it is glibc, whose heap has arenas and can be trimmed."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None
