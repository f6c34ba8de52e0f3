"""A disk that refuses one request: the n-th opening, writing, syncing, renaming or making of a folder."""

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CODES = (errno.ENOSPC, errno.EIO, errno.EACCES)


class Disk:
    """Counts the requests for what lies below `root`, and calls `refuse` at one of them."""

    def __init__(self, root: Path, at: int, refuse: Callable[[], object]) -> None:
        self.root, self.at, self.refuse = root.resolve(), at, refuse
        self.requests = 0

    def ask(self, path: object) -> None:
        """Count a request, unless it is for another place."""
        inside = isinstance(path, str | Path) and Path(path).absolute().is_relative_to(self.root)
        self.requests += inside
        if inside and self.requests == self.at:
            self.refuse()


def refusal(code: int) -> Callable[[], object]:
    """Return what raises an error as the system does."""

    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    return refuse


@contextmanager
def failing_disk(root: Path, at: int, refuse: Callable[[], object]) -> Iterator[Disk]:
    """Have the `at`-th request for what lies below `root` refused, by whatever `refuse` does; 0 refuses none."""
    disk, opened, plain_open = Disk(root, at, refuse), {}, io.open

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            disk.ask(self.name)
            return super().write(data)

    def open_file(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if not set(mode) & set("wax") or "opener" in options:  # which asks by itself
            return plain_open(file, mode, *args, **options)
        disk.ask(file)
        raw = File(file, mode.replace("b", ""))
        opened[raw.fileno()] = file
        text = dict(zip(("buffering", "encoding", "errors", "newline"), args, strict=False)) | options
        text.pop("buffering", None)
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, **text)

    def asking(call: Callable[..., Any], place: Callable[..., object]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            disk.ask(place(*args))
            return call(*args, **options)

        return wrapped

    def os_open(path: Any, *args: Any, **options: Any) -> int:
        disk.ask(path)
        opened[descriptor := plain_os_open(path, *args, **options)] = path
        return descriptor

    plain_os_open = os.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", open_file)
        patch.setattr(builtins, "open", open_file)
        patch.setattr(os, "open", os_open)
        patch.setattr(os, "fsync", asking(os.fsync, opened.get))
        for name in ("replace", "mkdir"):
            patch.setattr(os, name, asking(getattr(os, name), lambda path, *_: path))
        yield disk
