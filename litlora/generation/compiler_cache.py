"""The folder in which torch keeps what its compiler has compiled, for later processes."""

import os
from contextlib import suppress
from pathlib import Path
from struct import Struct

from litlora.errors import LitLoraError
from litlora.utils.locks import take

ELF = Struct("<40xQ10xHH2x")
"""What the header of a library says of its section headers, with which it ends: offset, length of one and number."""


def remove_truncated_libraries(cache: Path) -> None:
    """Remove the libraries that were being written when a compiler was killed: torch takes them for compiled."""
    for library in cache.glob("*/*.so"):
        with suppress(OSError, LitLoraError):  # removed by another process, or of another user
            if not is_intact(library):
                remove_truncated(library, cache / "locks" / f"{library.name.partition('.')[0]}.lock")


def remove_truncated(library: Path, lock: Path) -> None:
    """Remove a library unless another process, which holds its lock, compiles it or has done so by now."""
    descriptor = take(lock)
    if descriptor is None:
        return
    try:
        if not is_intact(library):
            library.unlink()
    finally:
        os.close(descriptor)


def is_intact(library: Path) -> bool:
    """Tell whether a library is as long as its ELF header says; one of another format is if it has a header."""
    with library.open("rb") as file:
        header = file.read(ELF.size)
    if len(header) < ELF.size or not any(header):
        return False
    offset, length, count = ELF.unpack(header)
    return not header.startswith(b"\x7fELF") or bool(library.stat().st_size >= offset + length * count)
