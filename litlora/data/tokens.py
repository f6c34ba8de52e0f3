"""Tokens of a split: ids with their labels, and what the checks of the data need to know about each sequence."""

import mmap
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CHUNK = 4_000_000  # ids that are read at once
ABOUT = np.dtype(
    [("line", "<i4"), ("flags", "<u4"), ("last_label", "<i4"), ("labels", "<i4"), ("same", "<u8"), ("similar", "<u8")]
)
"""What the checks of the data need to know about a sequence.

line: in the split, counted from 1. flags: a bit for each check of rows or sequences that found something. last_label:
the number of input tokens before its last label. labels: their number. same, similar: hashes of its example, 0 for all
but the first sequence of an example.
"""


class Tokens(NamedTuple):
    """The tokens of all sequences, concatenated in `ids`; a token that is not a label is stored as -1 - id.

    The first token of a sequence is never a label, and the last token is only ever a label.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    """The start of each sequence in `ids`, and the end of the last one."""
    first_labels: NDArray[np.int32]
    """The number of input tokens before each sequence's first label; its number of input tokens if it has no label."""
    about: NDArray[np.void]
    """What the checks of the data need to know about each sequence, of the type ABOUT."""
    memory: mmap.mmap | None = None
    """The mapped file behind `ids`, if there is one."""
    digest: str = ""
    """A hash of ids and offsets, if they are those of the token cache."""

    def example(self, row: int, length: int) -> NDArray[np.int32]:
        """Return the first `length` tokens of an example, and one more as the last label."""
        start = int(self.offsets[row])
        ids = self.ids[start : start + length + 1].copy()
        self._release_pages()
        return ids

    def with_lines_from(self, before: int) -> "Tokens":
        """Return the same tokens of a chunk with this number of lines before it."""
        about = self.about.copy()
        about["line"] += before
        return self._replace(about=about)

    def max_id(self) -> int:
        """Return the highest token id."""
        highest = 0
        for start in range(0, len(self.ids), CHUNK):
            chunk = self.ids[start : start + CHUNK]
            highest = max(highest, int(chunk.max()), ~int(chunk.min()))
            self._release_pages()
        return highest

    def rows_with_ids_from(self, lowest: int) -> tuple[int, int]:
        """Return the first sequence with an id from `lowest` on, and the number of such sequences."""
        found: set[int] = set()
        for start in range(0, len(self.ids), CHUNK):
            chunk = self.ids[start : start + CHUNK]
            positions = start + np.flatnonzero((chunk >= lowest) | (chunk <= ~lowest))
            found.update((np.searchsorted(self.offsets, positions, side="right") - 1).tolist())
            self._release_pages()
        return min(found), len(found)

    def _release_pages(self) -> None:
        if self.memory is not None:
            self.memory.madvise(mmap.MADV_DONTNEED)  # or every page read so far counts as this process's memory
