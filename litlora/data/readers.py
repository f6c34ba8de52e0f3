"""Readers of JSONL, JSON, CSV, TSV and Parquet files: rows with their locations."""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Self

from litlora.errors import LitLoraError
from litlora.utils.console import log

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
"""Encodings by the bytes that a file begins with, UTF-32 before UTF-16, which begins with the same two."""
UTF8 = ("utf-8", "utf-8-sig")
DELIMITERS = ",;\t|"
WRAPPERS = ("data", "rows", "examples", "instances", "items", "train")
"""Keys under which a JSON object may hold the list of its rows."""
BLANKS = re.compile(r"[ \t\r\n]*")
BATCH = 1000  # rows of a Parquet file that are read at once


class RowError(Exception):
    """What is wrong with a row; the caller adds its location."""


@dataclass(frozen=True)
class RawFile:
    """A file before it is parsed, and its name in error messages."""

    name: str
    suffix: str
    open: Callable[[], io.BufferedReader | io.BytesIO]
    encoding: str | None = None
    """The encoding of its text; None for the one that its byte order mark names, else UTF-8."""

    @classmethod
    def from_path(cls, path: Path, if_missing: str) -> Self:
        """Return a file on disk that can be read; `if_missing` is the error message if there is none."""
        open_file(path, if_missing).close()
        return cls(str(path), path.suffix, lambda: open_file(path, if_missing))

    @classmethod
    def from_bytes(cls, name: str, suffix: str, content: bytes) -> Self:
        """Return a file that is in memory."""
        return cls(name, suffix, lambda: io.BytesIO(content))


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
        *others, last = PARSERS
        raise LitLoraError(f"{file.name} cannot be read: its name must end in {', '.join(others)} or {last}")
    return parser(file)


def json_type(value: object) -> str:
    """Return the name of a JSON value's type, for error messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


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


def _utf8_lines(file: RawFile) -> Iterator[bytes]:
    """Yield the lines of a text file with their ends, in UTF-8 whatever the encoding of the file."""
    with file.open() as opened:
        beginning = opened.read(4)
        opened.seek(0)
        marked = (encoding for mark, encoding in BYTE_ORDER_MARKS.items() if beginning.startswith(mark))
        encoding = next(marked, file.encoding or "utf-8")
        if encoding.lower() in UTF8:
            opened.seek(jsonl_start(opened))
            for line in opened:
                yield from line.splitlines(keepends=True)
        else:
            yield from _recoded_lines(file.name, opened, encoding)


def _recoded_lines(name: str, file: BinaryIO, encoding: str) -> Iterator[bytes]:
    try:
        with io.TextIOWrapper(file, encoding, newline="") as lines:
            for line in lines:
                yield line.encode()
    except LookupError as error:
        raise LitLoraError(f"--encoding ({encoding}) is unknown: give one such as cp1252, latin-1 or utf-16") from error
    except UnicodeError as error:
        raise LitLoraError(f"{name} is not valid {encoding} ({error})") from error


def _jsonl_rows(file: RawFile) -> Rows:
    if _first_character(file) == b"[":  # one array, as some programs name .jsonl
        yield from _json_rows(file)
        return
    for number, row in jsonl_rows(line.rstrip(b"\r\n") for line in _utf8_lines(file)):
        yield f"{file.name} line {number}", row


def _first_character(file: RawFile) -> bytes:
    lines = _utf8_lines(file)
    try:
        return next((line.lstrip()[:1] for line in lines if line.strip()), b"")
    finally:
        lines.close()  # type: ignore[attr-defined]  # closes the file as well


def _json_rows(file: RawFile) -> Rows:
    text = _decode(file)
    start = _skip_blanks(text, 0)
    if not text[start:]:
        return
    if text[start] == "[":
        yield from _array_rows(file.name, text, start)
    elif _is_jsonl(text):
        yield from _jsonl_rows(file)
    else:
        yield from _wrapped_rows(file.name, _parse_json(file.name, text, start)[0])


def _is_jsonl(text: str) -> bool:
    """Return whether a text holds an object in its first line and more lines, as many .json files do."""
    first, _, rest = text.strip().partition("\n")
    return bool(rest) and isinstance(_parse_line(first.encode(errors="surrogatepass")), dict)


def _skip_blanks(text: str, start: int) -> int:
    match = BLANKS.match(text, start)
    return match.end() if match else start


def _array_rows(name: str, text: str, start: int) -> Rows:
    """Yield the elements of an array one by one."""
    position = _skip_blanks(text, start + 1)
    number = 0
    while text[position : position + 1] != "]":
        number += 1
        row, position = _parse_json(name, text, position, f" row {number}")
        yield f"{name} row {number}", row
        position = _skip_blanks(text, position)
        if text[position : position + 1] == ",":
            position = _skip_blanks(text, position + 1)
        elif text[position : position + 1] != "]":
            _refuse_json(name, json.JSONDecodeError("Expecting ',' delimiter", text, position))
    if text[_skip_blanks(text, position + 1) :]:
        _refuse_json(name, json.JSONDecodeError("Extra data", text, position + 1))


def _parse_json(name: str, text: str, start: int, row: str = "") -> tuple[Any, int]:
    """Return the JSON value that begins at a position, and where it ends."""
    try:
        return _DECODER.raw_decode(text, start)
    except RowError as error:
        raise LitLoraError(f"{name}{row}: {error}") from error
    except (ValueError, RecursionError) as error:
        _refuse_json(name, error)


def _refuse_json(name: str, error: Exception) -> NoReturn:
    raise LitLoraError(f"{name} is not valid JSON ({error})") from error


def _wrapped_rows(name: str, value: object) -> Rows:
    """Yield the rows of a list that an object holds, or else the object as the only row."""
    wrapper = next((key for key in WRAPPERS if isinstance(value, dict) and isinstance(value.get(key), list)), None)
    if wrapper is None or not isinstance(value, dict):
        yield f"{name} row 1", value
        return
    if others := [f'"{key}"' for key in value if key != wrapper]:
        log(f'{name}: the rows are those of "{wrapper}"; {", ".join(others)} is left out')
    for number, row in enumerate(value[wrapper], start=1):
        yield f"{name} row {number}", row


def _csv_rows(file: RawFile) -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default refuses cells above 128 KiB
    reader, skipped = _csv_reader(file)
    line = skipped
    columns: list[str] = []
    try:
        for cells in reader:
            if cells and columns:
                yield f"{file.name} line {line + 1}", _join(columns, cells)
            columns = columns or _columns(file.name, cells)
            line = skipped + reader.line_num  # a row may span lines: its location is its first line
    except csv.Error as error:
        raise LitLoraError(f"{file.name} line {line + 1}: this is not valid CSV ({error})") from error


def _csv_reader(file: RawFile) -> tuple[Any, int]:
    """Return a reader for the dialect that the header shows, and the number of lines before the header."""
    lines = _text_lines(file)
    header = next((line for line in lines if line.strip()), "")
    declared = re.fullmatch(r'"?sep=(.)"?\s*', header)  # by Excel
    unquoted = re.sub('"[^"]*"', "", header)
    delimiter = declared[1] if declared else _delimiter(file.suffix, unquoted)
    has_blanks = re.search(rf"{re.escape(delimiter)} +\S", unquoted) is not None
    lines = _text_lines(file)
    skipped = 0
    if declared:
        skipped = 1 + next(number for number, line in enumerate(lines) if line == header)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=has_blanks, strict=True)
    return reader, skipped


def _delimiter(suffix: str, header: str) -> str:
    return "\t" if suffix.lower() == ".tsv" and "\t" in header else max(DELIMITERS, key=header.count)


def _text_lines(file: RawFile) -> Iterator[str]:
    for number, line in enumerate(_utf8_lines(file), start=1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise LitLoraError(f"{file.name} line {number}: {_not_utf8(error)}") from error


def _columns(name: str, cells: list[str]) -> list[str]:
    """Return the names of the columns without blanks around them."""
    columns = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, start=1)]
    if repeated := [column for column in columns if columns.count(column) > 1]:
        raise LitLoraError(f'{name}: the header names the column "{repeated[0]}" twice; rename or remove one of them')
    return columns


def _join(columns: list[str], cells: list[str]) -> object:
    if len(cells) != len(columns):
        return RowError(f"the row has {len(cells)} cells, but the header has {len(columns)}")
    return dict(zip(columns, cells, strict=True))


def _parquet_rows(file: RawFile) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise LitLoraError(f"{file.name} needs pyarrow: install it with: pip install 'litlora[parquet]'") from error
    with file.open() as opened:
        try:
            table = parquet.ParquetFile(opened)
            _columns(file.name, table.schema_arrow.names)
            rows = (row for batch in table.iter_batches(BATCH) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{file.name} row {number}", _without_nulls(row)
        except (ArrowException, OSError) as error:
            raise LitLoraError(f"{file.name} is not valid Parquet ({' '.join(str(error).split())})") from error


def _without_nulls(value: Any) -> Any:
    """Leave out the keys that Parquet adds, as null, to each object of a list that holds objects of several kinds."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _decode(file: RawFile) -> str:
    return "".join(_text_lines(file))


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = f"the byte 0x{error.object[error.start]:02x} is not valid UTF-8"
    return f"{byte}; save the file as UTF-8, or prepare it with its encoding, such as --encoding cp1252"


PARSERS: dict[str, Callable[[RawFile], Rows]] = {
    ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows,
    ".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows,
}  # fmt: skip
