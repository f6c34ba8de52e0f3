"""Rows that occur more than once: exact duplicates, and near ones, which differ in case and punctuation only."""

import json
from array import array
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from litlora.data.examples import Example

Rows = NDArray[np.int64]
"""Indices of rows."""
Hashes = NDArray[np.uint64]
"""Hashes of rows by index."""
ENCODER = json.JSONEncoder(sort_keys=True)
NO_LETTERS = {code: None for code in range(128) if not chr(code).isalnum()}


class Fingerprints:
    """Hashes of rows by index: equal for exact duplicates, and equal for near ones."""

    def __init__(self) -> None:
        self._exact = array("Q")
        self._near = array("Q")

    def append(self, example: Example) -> None:
        """Add the hashes of the next row."""
        exact, near = digests(example)
        self._exact.append(exact)
        self._near.append(near)

    @property
    def exact(self) -> Hashes:
        """Hashes that exact duplicates share."""
        return np.array(self._exact)

    @property
    def near(self) -> Hashes:
        """Hashes that near duplicates share."""
        return np.array(self._near)


def digests(example: Example) -> tuple[int, int]:
    """Return a hash of an example, and one that is equal for examples that differ in case and punctuation only.

    Neither depends on the format of the row, and neither is 0.
    """
    messages = [(message.to_json(), message.input) for message in example.messages]
    exact = ENCODER.encode([example.text, messages, example.tools])
    return _hash(exact), _hash(_letters_and_digits("".join(_texts(example)).casefold()) or exact)


def _letters_and_digits(text: str) -> str:
    # translate is three times as fast, but has a table for ASCII only
    return text.translate(NO_LETTERS) if text.isascii() else "".join(filter(str.isalnum, text))


def _texts(example: Example) -> Iterator[str]:
    yield example.text
    for message in example.messages:
        yield from (message.question, message.reasoning)
        yield from (json.dumps(call.to_json(), sort_keys=True) for call in message.tool_calls)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") | 1


def without_repeats(rows: Rows, hashes: Hashes) -> Rows:
    """Return the rows that repeat no earlier one."""
    _, firsts = np.unique(hashes[rows], return_index=True)
    return rows[np.sort(firsts)]


def repeated(rows: Rows, hashes: Hashes, among: Rows) -> NDArray[np.bool_]:
    """Tell which rows are `among` other rows as well."""
    return np.isin(hashes[rows], hashes[among])


def keep_groups_together(train: Rows, val: Rows, hashes: Hashes) -> tuple[Rows, Rows]:
    """Move rows between the splits until those of equal hashes are on one side, and no split has grown.

    Without equal hashes, both splits stay as they are.
    """
    rows = np.concatenate([val, train])
    _, firsts, group, sizes = np.unique(hashes[rows], return_index=True, return_inverse=True, return_counts=True)
    by_first = np.argsort(firsts)  # so that groups of the validation split come before the others
    chosen = by_first[_fitting(sizes[by_first], len(val))]
    rank = np.full(len(sizes), -1)
    rank[chosen] = np.arange(len(chosen))
    ranks = rank[group]
    is_val = ranks >= 0
    moved = rows[is_val][np.argsort(ranks[is_val], kind="stable")]
    return np.concatenate([train[~is_val[len(val) :]], val[~is_val[: len(val)]]]), moved


def _fitting(sizes: NDArray[np.int64], room: int) -> list[int]:
    """Return the positions of the groups that fill the room, each taken if it fits in what is left."""
    chosen = []
    for position, size in enumerate(sizes):
        if size <= room:
            chosen.append(position)
            room -= int(size)
        if not room:
            break
    return chosen
