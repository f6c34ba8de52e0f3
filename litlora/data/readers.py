"""Readers of .jsonl, .json and .csv files: rows with their locations."""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from litlora.errors import LitLoraError


class RowError(Exception):
    """What is wrong with a row; the caller adds its location."""


@dataclass(frozen=True)
class RawFile:
    """The content of a file before it is parsed, and its name in error messages."""

    name: str
    suffix: str
    content: bytes

    @classmethod
    def from_path(cls, path: Path, if_missing: str) -> Self:
        """Read a file; `if_missing` is the error message if there is none."""
        with open_file(path, if_missing) as file:
            return cls(str(path), path.suffix, file.read())


def open_file(path: Path, if_missing: str) -> io.BufferedReader:
    """Open a file for reading; `if_missing` is the error message if there is none."""
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise LitLoraError(if_missing) from error
    except OSError as error:
        raise LitLoraError(f"cannot read {path}: {error.strerror}") from error


Rows = Iterator[tuple[str, object]]


def parse_rows(file: RawFile) -> Rows:
    """Yield each row with its location; instead of a row that cannot be parsed, its RowError."""
    parser = PARSERS.get(file.suffix.lower())
    if parser is None:
        raise LitLoraError(f"{file.name} cannot be read: its name must end in {' or '.join(PARSERS)}")
    return parser(file)


def json_type(value: object) -> str:
    """Return the name of a JSON value's type, for error messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _jsonl_rows(file: RawFile) -> Rows:
    for number, row in jsonl_rows(jsonl_lines(io.BytesIO(file.content))):
        yield f"{file.name} line {number}", row


def jsonl_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a .jsonl file, without a byte order mark."""
    file.seek(jsonl_start(file))
    for line in file:
        yield from line.splitlines()  # a \r alone ends a line too


def jsonl_start(file: BinaryIO) -> int:
    """Return the offset of the first line of a .jsonl file: after the byte order mark, if there is one."""
    return len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0


def jsonl_rows(lines: Iterable[bytes]) -> Iterator[tuple[int, object]]:
    """Yield the number of each line that is not blank, and its row or RowError."""
    # Lines of bytes, since lines of a str also end at U+2028 and others that a row may contain.
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _parse_line(line)


def _parse_line(line: bytes) -> object:
    try:
        return _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return RowError(_not_utf8(error))
    except RowError as error:
        return error
    except json.JSONDecodeError as error:
        return RowError(f"this is not valid JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deeply nested lists
        return RowError(f"this JSON cannot be read ({error})")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object; RowError if it gives a key twice, since one value would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        key = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise RowError(f'the key "{key}" is given twice')
    return values


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)  # pandas writes NaN for a missing value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _json_rows(file: RawFile) -> Rows:
    text = _decode(file)
    try:
        rows = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        hint = "if it holds one row per line, name it .jsonl"
        raise LitLoraError(f"{file.name} is not valid JSON ({error}); {hint}") from error
    if not isinstance(rows, list):
        raise LitLoraError(f"{file.name} holds {json_type(rows)}, but it must be a list of rows")
    for number, row in enumerate(rows, start=1):
        yield f"{file.name} row {number}", row


def _csv_rows(file: RawFile) -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default refuses cells above 128 KiB
    reader = csv.reader(io.StringIO(_decode(file), newline=""), strict=True)
    columns: list[str] = []
    line = 1
    try:
        for cells in reader:
            if cells and columns:
                yield f"{file.name} line {line}", _join(columns, cells)
            columns = columns or cells
            line = reader.line_num + 1  # a row may span lines: its location is its first line
    except csv.Error as error:
        raise LitLoraError(f"{file.name} line {line}: this is not valid CSV ({error})") from error


def _join(columns: list[str], cells: list[str]) -> object:
    if len(cells) != len(columns):
        return RowError(f"the row has {len(cells)} cells, but the header has {len(columns)}")
    return dict(zip(columns, cells, strict=True))


def _decode(file: RawFile) -> str:
    try:
        return file.content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise LitLoraError(f"{file.name} line {line}: {_not_utf8(error)}") from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"the byte 0x{error.object[error.start]:02x} is not valid UTF-8; save the file as UTF-8"


PARSERS: dict[str, Callable[[RawFile], Rows]] = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
