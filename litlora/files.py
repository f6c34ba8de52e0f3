"""Files and folders that appear whole or not at all, and JSON that is read with care."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from io import BufferedReader
from pathlib import Path
from secrets import token_hex
from typing import Any

from litlora.errors import LitLoraError

BLOCK = 4_000_000  # bytes of a file that are hashed at one time
DIGEST_THREADS = 8


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
                _sync(path.parent)


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


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Lend a folder beside `path` that takes its name once the block ends well, and vanishes otherwise.

    Raises LitLoraError when it cannot be written, or when `path` is there already and holds something.
    """
    partial = path.with_name(f".{path.name}.{token_hex(4)}.partial")  # process ids repeat in containers
    with failure_said(path):
        partial.mkdir(parents=True)
    try:
        with failure_said(path):
            yield partial
            for file in partial.iterdir():
                _sync(file)
            _sync(partial)
            partial.replace(path)
            _sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    """Make a file's content, or the renames in a folder, outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def failure_said(path: Path) -> Iterator[None]:
    """Turn a failure to write into the sentence that names the path."""
    try:
        yield
    except OSError as error:
        raise LitLoraError(f"cannot write {path}: {error.strerror}") from error


def check_writable(path: Path, flag: str) -> None:
    """Refuse a folder in which nothing could be written; nothing is left behind."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise LitLoraError(f"{flag} ({path}) cannot be written: {error.strerror}") from error
