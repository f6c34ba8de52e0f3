"""Files and folders that are written atomically, and JSON that is read with care."""

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from io import BufferedReader
from pathlib import Path
from secrets import token_hex
from typing import Any

import yaml

from litlora.errors import LitLoraError

# As which PyYAML refuses a text; all but the first where a value is not of the kind that its tag says.
YAML_FAULTS = (yaml.YAMLError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
BLOCK = 4_000_000  # bytes of a file that are hashed at one time
DIGEST_THREADS = 8
TOGETHER = ".together"  # folder of files that are whole and wait for their names


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise LitLoraError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise LitLoraError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise LitLoraError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def digest(file: BufferedReader) -> str:
    """Return a hash of a file's content, which all cores compute together."""
    starts = range(0, os.fstat(file.fileno()).st_size, BLOCK)
    with ThreadPoolExecutor(DIGEST_THREADS) as pool:
        parts = pool.map(lambda start: sha256(os.pread(file.fileno(), BLOCK, start)).digest(), starts)
        return sha256(b"".join(parts)).hexdigest()


def write_whole(contents: Mapping[Path, bytes]) -> None:
    """Write files that get their names in this order, and only once all of them are safe on the disk."""
    with ExitStack() as cleanup:
        partials = {path: _stage(path, content, cleanup) for path, content in contents.items()}
        for path, partial in partials.items():
            with failure_said(path):
                partial.replace(path)
                sync(path.parent)


def _stage(path: Path, content: bytes, cleanup: ExitStack) -> Path:
    """Write `content` beside `path`, under a name that `cleanup` removes if it is still there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with failure_said(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with failure_said(path), partial.open("wb") as file:
        cleanup.callback(partial.unlink, missing_ok=True)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return partial


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files of a folder that change at one moment, whatever happens: from then on `finish_writing` moves them."""
    with failure_said(folder):
        folder.mkdir(parents=True, exist_ok=True)
    finish_writing(folder)
    for orphan in folder.glob(f".{TOGETHER}.*"):  # of a process that was killed
        shutil.rmtree(orphan, ignore_errors=True)
    with whole_directory(folder / TOGETHER) as staging:
        for name, content in contents.items():
            with failure_said(folder / name):
                (staging / name).write_bytes(content)
    finish_writing(folder)


def finish_writing(folder: Path) -> None:
    """Give their names to files that `write_together` wrote but, since it was killed, did not move."""
    staging = folder / TOGETHER
    if not staging.is_dir():
        return
    for path in [folder / staged.name for staged in staging.iterdir()]:
        with failure_said(path), suppress(FileNotFoundError):  # another process moves them too
            (staging / path.name).replace(path)
    with failure_said(folder), suppress(FileNotFoundError):
        sync(folder)
        staging.rmdir()


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Lend a folder beside `path` that takes its name once the block ends well, and vanishes otherwise.

    What a killed process has left of it vanishes with the next attempt. Raises LitLoraError when it cannot be written,
    or when `path` is there already and holds something.
    """
    _remove_remains(path)
    with failure_said(path), ExitStack() as cleanup:
        partial = _own_folder(path, cleanup)
        yield partial
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        partial.replace(path)
        sync(path.parent)


def _own_folder(path: Path, cleanup: ExitStack) -> Path:
    """Make a folder beside `path`, and hold it until `cleanup` removes it if it is still there.

    Until it is held, another process may take it for remains: then there is another.
    """
    while True:
        folder = path.with_name(f".{path.name}.{token_hex(4)}.partial")  # process ids repeat in containers
        folder.mkdir(parents=True)
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        with suppress(FileNotFoundError):
            cleanup.enter_context(_held(folder, waits=True))
            if folder.exists():
                return folder


def _remove_remains(path: Path) -> None:
    """Remove the folders that `whole_directory` has made for `path` and that nobody holds any more."""
    for remains in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with suppress(OSError), _held(remains) as is_ours:
            if is_ours:
                shutil.rmtree(remains)


@contextmanager
def _held(folder: Path, *, waits: bool = False) -> Iterator[bool]:
    """Hold a folder until the process lets go or ends, and tell whether it could be held.

    It cannot where another process does so, unless this one waits for that, nor on the disks of some networks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _lock(descriptor, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except OSError:
        return False
    return True


def sync(path: Path) -> None:
    """Make a file's content, or the renames in a folder, outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def failure_said(path: Path) -> Iterator[None]:
    """Say which file could not be written, and why."""
    try:
        yield
    except OSError as error:
        raise LitLoraError(f"cannot write {path}: {error.strerror}") from error


def check_writable(path: Path, flag: str) -> None:
    """Refuse a folder in which nothing could be written; nothing is left behind."""
    try:
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise LitLoraError(f"{flag} ({path}) cannot be written: {error.strerror}") from error
