"""A folder that only one process at a time may work in."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from litlora.errors import LitLoraError
from litlora.utils.files import check_writable

LOCK = ".lock"


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Make a folder this process's own, or refuse it when it is another's; one that stays empty vanishes again.

    The kernel gives the lock back however the process ends, so that a file which is left by a killed one locks nobody
    out.
    """
    check_writable(folder, flag)
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    descriptor = _take(folder / LOCK, flag)
    try:
        yield
    finally:
        with suppress(OSError):  # a folder that is no longer writable keeps the file, which locks nobody out
            (folder / LOCK).unlink(missing_ok=True)
        for path in made:
            with suppress(OSError):  # it holds something
                path.rmdir()
        os.close(descriptor)


def _take(path: Path, flag: str) -> int:
    """Lock a file and return its descriptor; where its last owner has just removed it, lock another."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        hint = "wait for its end, or choose another folder"
        raise LitLoraError(f"{flag} ({path.parent}) is in use by another run: {hint}") from error
    except OSError as error:
        raise LitLoraError(f"{flag} ({path.parent}) cannot be locked: {error.strerror}") from error
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    os.close(descriptor)
    return _take(path, flag)
