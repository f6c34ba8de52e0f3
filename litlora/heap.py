"""The heap of a CPU's C library: what it does with the gaps between what is kept."""

import ctypes
import os
import sys

TUNABLES = "GLIBC_TUNABLES"
NO_CRUMBS = ("glibc.malloc.tcache_count=0", "glibc.malloc.mxfast=0")
GPUS = ("/dev/nvidiactl", "/dev/kfd")
"""What a machine with one has, as can be told before torch is there."""

ARENA_MAX = -8  # as glibc's malloc.h numbers it


def restart_without_crumbs() -> None:
    """Begin the program anew, as the same process, with a heap whose gaps are filled again: glibc's alone is not so.

    To align a tensor, glibc takes some bytes more, and cuts crumbs off on both sides. They go to caches for small
    things, so that once the tensor has gone, its place is a crumb too small for the next one of its size: passes leave
    gaps half as large as what they keep. Without these caches crumbs become part of a free place again. As glibc reads
    such a setting only when a program begins, this is to be called before anything is done.

    Small things then take a fifth longer, which a CPU does not feel, but a GPU might, that waits for a CPU's calls.
    """
    before = os.environ.get(TUNABLES, "")
    if _glibc() is None or NO_CRUMBS[0] in before or any(map(os.path.exists, GPUS)):
        return
    os.environ[TUNABLES] = ":".join(filter(None, (*NO_CRUMBS, before)))  # the last word is the user's
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


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
