"""Rows that occur more than once: exact duplicates, and near ones, which differ in case and punctuation only."""

import json
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

from litlora.data.examples import Example


class Fingerprints:
    """Hashes of rows by index: equal for exact duplicates, and equal for near ones."""

    def __init__(self) -> None:
        self.exact = array("Q")
        self.near = array("Q")

    def append(self, example: Example) -> None:
        """Add the hashes of the next row."""
        exact, near = digests(example)
        self.exact.append(exact)
        self.near.append(near)


def digests(example: Example) -> tuple[int, int]:
    """Return a hash of an example, and one that is equal for examples that differ in case and punctuation only.

    Neither depends on the format of the row, and neither is 0.
    """
    messages = [(message.to_json(), message.input) for message in example.messages]
    exact = json.dumps([example.text, messages, example.tools], sort_keys=True)
    return _hash(exact), _hash("".join(filter(str.isalnum, "".join(_texts(example)).casefold())) or exact)


def _texts(example: Example) -> Iterator[str]:
    yield example.text
    for message in example.messages:
        yield from (message.question, message.reasoning)
        yield from (json.dumps(call.to_json(), sort_keys=True) for call in message.tool_calls)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") | 1


def without_repeats(indices: Iterable[int], hashes: Sequence[int]) -> list[int]:
    """Return the rows that repeat no earlier one."""
    firsts: dict[int, int] = {}
    for index in indices:
        firsts.setdefault(hashes[index], index)
    return list(firsts.values())


def repeated(indices: Iterable[int], hashes: Sequence[int], among: Iterable[int]) -> list[int]:
    """Return the positions in `indices` of rows that are `among` other rows as well."""
    others = {hashes[index] for index in among}
    return [position for position, index in enumerate(indices) if hashes[index] in others]


def keep_groups_together(
    train: Sequence[int], val: Sequence[int], hashes: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Move rows between the splits until those of equal hashes are on one side, and no split has grown.

    Without equal hashes, both splits stay as they are.
    """
    groups = defaultdict(list)
    for index in (*val, *train):
        groups[hashes[index]].append(index)
    chosen: list[int] = []
    for group in groups.values():  # in the order of their first rows, those of the validation split before the others
        if len(chosen) + len(group) <= len(val):
            chosen += group
    moved = set(chosen)
    return [index for index in (*train, *val) if index not in moved], chosen
