"""Environment variables that libraries read when they are loaded: those of glibc's allocator and of OpenMP."""

import ctypes
import os

TUNABLES = "GLIBC_TUNABLES"
NO_CACHES = ("glibc.malloc.tcache_count=0", "glibc.malloc.mxfast=0")
SHORT_WAITS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}
"""How OpenMP's threads wait: they sleep; GNU's first spin for about as long as lies between two products."""
SPINNING = (*SHORT_WAITS, "KMP_BLOCKTIME")  # how long OpenMP's threads spin: any runtime, GNU's, Intel's
GPUS = ("/dev/nvidiactl", "/dev/kfd")
"""Device files of a machine with a GPU, which can be looked for before torch is imported."""


def has_gpu() -> bool:
    """Tell whether torch could find a GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and any(map(os.path.exists, GPUS))


def allocator_settings() -> dict[str, str]:
    """Return the variables that a process should start with to train on a CPU; none where they are set or useless.

    To align a tensor, glibc takes a few bytes more and cuts remainders off on both sides. Its caches for small
    allocations keep these remainders, so that the memory of a freed tensor is too small for the next one of its size:
    forward and backward leave gaps half as large as what is in use. Without the caches, remainders merge with the free
    memory beside them. glibc reads the setting when a process starts.

    Small allocations then take a fifth longer, which a CPU does not feel, but a GPU might that waits for a CPU's calls.
    """
    given = os.environ.get(TUNABLES, "")
    if not hasattr(ctypes.CDLL(None), "malloc_trim") or NO_CACHES[0] in given or has_gpu():
        return {}
    return {
        TUNABLES: ":".join(filter(None, (*NO_CACHES, given)))
    }  # glibc takes the last value of a setting: the user's


def let_threads_sleep() -> None:
    """Have OpenMP's threads sleep soon where there is no GPU: spinning ones take the cores from other processes.

    OpenMP reads the variables when it is loaded, hence before torch is imported. A user's own setting stays.
    """
    if not has_gpu() and not any(name in os.environ for name in SPINNING):
        os.environ.update(SHORT_WAITS)
