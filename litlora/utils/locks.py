"""Locks that give one process at a time a folder or a piece of work; the kernel releases them however it ends."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from litlora.errors import LitLoraError
from litlora.utils.files import check_writable

LOCK = ".lock"


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Create and lock a folder, or refuse it if another process holds the lock; remove it again if it stays empty.

    The kernel releases the lock however the process ends, so the lock file of a killed process blocks nobody.
    """
    check_writable(folder, flag)
    with _removing_empty([path for path in (folder, *folder.absolute().parents) if not path.exists()]):
        descriptor = _acquire(folder / LOCK, flag)
        try:
            yield
        finally:
            with suppress(OSError):  # in a folder that is no longer writable the lock file stays, which blocks nobody
                (folder / LOCK).unlink(missing_ok=True)
            os.close(descriptor)


@contextmanager
def _removing_empty(folders: Sequence[Path]) -> Iterator[None]:
    """Remove those of the folders that are empty at the end."""
    try:
        yield
    finally:
        _remove_empty(folders)


def _remove_empty(folders: Sequence[Path]) -> None:
    for path in folders:
        with suppress(OSError):  # not empty
            path.rmdir()


@contextmanager
def holding(path: Path) -> Iterator[None]:
    """Wait for the lock of a file, which is created if need be, and hold it."""
    with reporting_lock_errors(path):
        descriptor = _lock(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def take(path: Path) -> int | None:
    """Take the lock of a file, which is created if need be, until the descriptor is closed; None if it is taken."""
    with suppress(BlockingIOError), reporting_lock_errors(path):
        return _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return None


@contextmanager
def reporting_lock_errors(path: Path) -> Iterator[None]:
    """Turn an error that is not another's lock into a LitLoraError: some file systems have no locks."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        hint = "choose a folder on another file system"
        raise LitLoraError(f"{path} cannot be locked ({error.strerror}): {hint}") from error


def _acquire(path: Path, flag: str) -> int:
    """Lock a file and return its descriptor; retry if its previous owner has just removed it."""
    try:
        descriptor = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        hint = "wait for its end, or choose another folder"
        raise LitLoraError(f"{flag} ({path.parent}) is in use by another run: {hint}") from error
    except OSError as error:
        raise LitLoraError(f"{flag} ({path.parent}) cannot be locked: {error.strerror}") from error
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    os.close(descriptor)
    return _acquire(path, flag)


def _lock(path: Path, operation: int) -> int:
    """Lock a file, which is created if need be; where its file system has no locks, remove what was created."""
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if not isinstance(error, BlockingIOError):
            path.unlink(missing_ok=True)
            _remove_empty(missing)
        os.close(descriptor)
        raise
    return descriptor
