"""Rows on disk while a data set is prepared, so that memory holds only where each of them begins."""

import json
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from litlora.data.examples import Example
from litlora.utils.files import reporting_write_errors, scratch_file


def to_line(example: Example) -> bytes:
    """Return an example as a line of train.jsonl."""
    return (json.dumps(example.to_json(), ensure_ascii=False) + "\n").encode()


class RowStore:
    """Lines of train.jsonl in a file on the disk of `folder`, which is removed at the end of the context."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._closing = ExitStack()
        self._starts = array("q", [0])

    def __enter__(self) -> Self:
        with reporting_write_errors(self._folder):
            self._file = self._closing.enter_context(scratch_file(self._folder))
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def append(self, example: Example) -> None:
        """Add an example as the last row; rows are read only after all of them are there."""
        line = to_line(example)
        with reporting_write_errors(self._folder):
            self._file.write(line)
        self._starts.append(self._starts[-1] + len(line))

    def complete(self) -> None:
        """Write what is still in memory: the last row is there."""
        with reporting_write_errors(self._folder):
            self._file.flush()

    def __getitem__(self, index: int) -> bytes:
        self._file.seek(self._starts[index])
        return self._file.read(self._starts[index + 1] - self._starts[index])


@dataclass(frozen=True)
class Selection:
    """Some of the stored rows, in an order of their own."""

    rows: RowStore
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[bytes]:
        return (self.rows[index] for index in self.indices)
