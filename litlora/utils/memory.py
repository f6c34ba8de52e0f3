"""How much memory this process has, and how much more it may take: the machine's, its cgroup's and its limits."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes"
VERSION_2 = "memory.max", "memory.current"
UNKNOWN_SHARE = 2
"""Where the system does not tell how much of its memory is free, one in this number of bytes counts as free."""


def total_memory() -> int:
    """Return the bytes of the machine's memory, or of the smallest cgroup that this process is in."""
    return min([_physical_memory(), *(limit for limit, _ in _cgroups())])


def resident_memory() -> int:
    """Return the bytes of this process that are in memory."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _pages()[1]


def forget_peak() -> None:
    """Have the peak of this process count from what is resident now, which only Linux offers."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def available_memory() -> int:
    """Return the bytes that this process may take beside those that it has."""
    if sys.platform != "linux":
        return _physical_memory() // UNKNOWN_SHARE
    pages = _pages()
    sizes = {resource.RLIMIT_AS: pages[0], resource.RLIMIT_DATA: pages[5]}
    limits = ((resource.getrlimit(kind)[0], size) for kind, size in sizes.items())
    left = [limit - size for limit, size in limits if limit != resource.RLIM_INFINITY]
    return max(0, min([_meminfo("MemAvailable"), *left, *(limit - used for limit, used in _cgroups())]))


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()


def _pages() -> list[int]:
    """Return the bytes of this process: address space, resident, shared, code, libraries, data."""
    return [int(count) * resource.getpagesize() for count in Path("/proc/self/statm").read_text("ascii").split()]


def _meminfo(name: str) -> int:
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    kilobytes = dict(line.split(":") for line in lines)[name].split()[0]
    return int(kilobytes) * 1024


def _cgroups() -> Iterator[tuple[int, int]]:
    """Yield the limit of each cgroup of this process that has one, and what its processes have taken of it."""
    for folder, names in _cgroup_folders():
        with suppress(OSError, ValueError, KeyError):  # no limit, which version 2 writes as a word
            limit, used = (int((folder / name).read_text("ascii")) for name in names)
            if limit < _physical_memory():
                counts = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
                yield limit, used - int(counts["inactive_file"])  # which the system frees before it lacks memory


def _cgroup_folders() -> Iterator[tuple[Path, tuple[str, str]]]:
    """Yield each cgroup that counts the memory of this process, with the names of the files of limit and use."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = CGROUPS / "memory" if controllers else CGROUPS
            names = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
            )
            folder = root / path.lstrip("/")
            for each in (folder, *folder.parents):
                if each.is_relative_to(root):
                    yield each, names
