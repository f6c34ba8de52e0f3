"""Rows of a data folder by their lines: report.json names them, and the page shows them while they are the same."""

from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from litlora.data.readers.parsers import RowError, jsonl_lines, jsonl_rows
from litlora.data.readers.row_formats import ANY

SHOWN = 600  # characters of a text


def digests_of(path: Path, lines: Collection[int]) -> dict[int, str]:
    """Return the hashes of lines, by which they are known again."""
    return {number: digest(line) for number, line in read_lines(path, lines).items()}


def digest(line: bytes) -> str:
    """Return the hash of a line, without its end."""
    return sha256(line.rstrip(b"\r\n")).hexdigest()[:16]


def texts_of(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str] | None]:
    """Return question and response of rows, each of which has its line and hash; None where the line has changed."""
    lines = read_lines(path, {row["line"] for row in rows})
    found: list[tuple[str, str] | None] = []
    for row in rows:
        line = lines.get(row["line"])
        found.append(None if line is None or digest(line) != row["sha256"] else _texts(line))
    return found


def read_lines(path: Path, numbers: Collection[int]) -> dict[int, bytes]:
    """Return lines of a file by their numbers, counted from 1; those that are not there are left out."""
    if not numbers or not path.is_file():
        return {}
    found = {}
    with path.open("rb") as file:
        for number, line in enumerate(jsonl_lines(file), start=1):
            if number in numbers:
                found[number] = line
            if number >= max(numbers):
                break
    return found


def _texts(line: bytes) -> tuple[str, str] | None:
    try:
        _, row = next(jsonl_rows([line]))
        turn = ANY.parse(row).example.turns[-1]
    except (RowError, StopIteration):
        return None
    return shortened("\n".join(filter(None, (turn.instruction, turn.input)))), shortened(turn.output)


def shortened(text: str) -> str:
    """Return a text, cut if it is long."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} [...]"
