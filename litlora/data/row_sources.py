"""Which source each validation row comes from, as dataset.json holds it: for a validation loss of each source."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby, islice, repeat
from pathlib import Path
from typing import Any

from litlora.errors import LitLoraError
from litlora.utils.console import log
from litlora.utils.files import read_json

ABOUT, KEY = "dataset.json", "val_row_sources"


@dataclass(frozen=True)
class RowSources:
    """The sources of the rows of a split."""

    names: tuple[str, ...] = ("",)
    rows: tuple[int, ...] = ()
    """The index of each row's source; without any, all rows are of the first one."""

    def of_line(self, line: int) -> int:
        """Return the index of the source of a line, counted from 1."""
        return self.rows[line - 1] if self.rows else 0


ONE_SOURCE = RowSources()


def about_sources(names: Sequence[str], lines: Iterable[bytes]) -> dict[str, object]:
    """Return what dataset.json says of the lines of val.jsonl, given each one's source; nothing if it is the same."""
    if len(unique := list(dict.fromkeys(names))) < 2:
        return {}
    runs = [(unique.index(name), sum(1 for _ in run)) for name, run in groupby(names)]
    rows = " ".join(f"{source}x{count}" if count > 1 else str(source) for source, count in runs)
    digest = sha256()
    for line in lines:
        digest.update(line)
    return {KEY: {"sources": unique, "rows": rows, "sha256": digest.hexdigest()}}


def read_row_sources(split: Path) -> RowSources:
    """Return the sources of the rows of val.jsonl, unless the file has changed since dataset.json was written."""
    with suppress(LitLoraError):  # there is no dataset.json
        if (about := read_json(split.with_name(ABOUT)).get(KEY)) is not None:
            return _checked(about, split)
    return ONE_SOURCE


def _checked(about: Any, split: Path) -> RowSources:
    digest, lines = sha256(), 0
    with split.open("rb") as file:
        for line in file:
            digest.update(line)
            lines += 1
    try:
        rows = tuple(islice(_expanded(about["rows"]), lines + 1))  # a count may be any number
        sources = RowSources(tuple(map(str, about["sources"])), rows)
        matches = about["sha256"] == digest.hexdigest() and len(rows) == lines
        is_valid = matches and set(rows) <= set(range(len(sources.names)))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        is_valid = False
    if is_valid:
        return sources
    log(f"{split} has changed since it was prepared: its loss is not reported by source")
    return ONE_SOURCE


def _expanded(rows: str) -> Iterator[int]:
    for run in rows.split():
        source, _, count = run.partition("x")
        yield from repeat(int(source), int(count or 1))
