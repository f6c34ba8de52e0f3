"""Readers of JSONL, JSON, CSV, TSV and Parquet files: rows with their locations."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from litlora.data.readers.json_text import JsonText
from litlora.data.readers.raw_files import BOM_UTF8, RawFile, not_utf8, read_chunks, split_lines
from litlora.errors import LitLoraError
from litlora.utils.console import log

DELIMITERS = ",;\t|"
WRAPPERS = ("data", "rows", "examples", "instances", "items", "train")
"""Keys under which a JSON object may hold the list of its rows."""
BATCH = 100  # rows of a Parquet file that are read at once
BUFFER = 1 << 20  # bytes of a Parquet file that are read at once
MAX_CELL = 16 << 20
"""Characters of the longest cell of a CSV file, each of four bytes in memory; a longer one has an open quote."""


class RowError(Exception):
    """What is wrong with a row; the caller adds its location."""


Rows = Iterator[tuple[str, object]]
TYPES: dict[type, str] = {
    dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null",
    int: "a number", float: "a number",
}  # fmt: skip


def parse_rows(file: RawFile) -> Rows:
    """Yield each row with its location; instead of a row that cannot be parsed, its RowError."""
    parser = PARSERS.get(file.suffix.lower())
    if parser is None:
        names = f"{', '.join(TEXTS)} or .parquet, or as in rows.jsonl.gz"
        raise LitLoraError(f"{file.name} cannot be read: its name must end in {names}")
    return parser(file)


def json_type(value: object) -> str:
    """Return the name of a value's type, for error messages."""
    return TYPES.get(type(value), f"a {type(value).__name__}")  # such as a date of a Parquet file


def jsonl_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a prepared split, without a byte order mark."""
    file.seek(jsonl_start(file))
    return split_lines(str(file.name), read_chunks(file))


def jsonl_start(file: BinaryIO) -> int:
    """Return the offset of the first line of a .jsonl file: after the byte order mark, if there is one."""
    return len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0


def jsonl_rows(lines: Iterable[bytes]) -> Iterator[tuple[int, object]]:
    """Yield the number of each line that is not blank, and its row or RowError."""
    # Lines of bytes, since lines of a str also end at U+2028 and others that a row may contain.
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _parse_line(line.rstrip(b"\r\n"))


def _parse_line(line: bytes) -> object:
    try:
        return _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return RowError(not_utf8(error))
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


def decode_json(text: str) -> Any:
    """Parse a JSON text, such as one in a cell; ValueError if it is none, RowError if it gives a key twice."""
    return _DECODER.decode(text)


def _jsonl_rows(file: RawFile) -> Rows:
    if _first_character(file) == b"[":  # one array, as some programs name .jsonl
        yield from _json_rows(file)
        return
    for number, row in jsonl_rows(file.lines()):
        yield f"{file.name} line {number}", row


def _first_character(file: RawFile) -> bytes:
    return next((chunk.lstrip()[:1] for chunk in file.chunks() if chunk.strip()), b"")


def _json_rows(file: RawFile) -> Rows:
    text = JsonText(file.name, file.chunks(), _DECODER)
    first = text.peek()
    if first == "[":
        yield from _array_rows(file.name, text)
        text.end()
    elif first == "{" and not _is_jsonl(file):
        yield from _object_rows(file)
    elif first:
        yield from _jsonl_rows(file) if first == "{" else _single_row(file)


def _is_jsonl(file: RawFile) -> bool:
    """Return whether a file holds an object in its first line and more lines, as many .json files do."""
    try:
        lines = (line for line in file.lines() if line.strip())
        return isinstance(_parse_line(next(lines)), dict) and next(lines, None) is not None
    except LitLoraError:  # a line without an end, or what is found again when the whole file is read
        return False


def _array_rows(name: str, text: JsonText) -> Rows:
    """Yield the elements of an array one by one."""
    number = 0
    try:
        for number, row in enumerate(text.elements(), start=1):
            yield f"{name} row {number}", row
    except RowError as error:
        raise LitLoraError(f"{name} row {number + 1}: {error}") from error


def _object_rows(file: RawFile) -> Rows:
    """Yield the rows of a list that an object holds, or else the object as the only row."""
    is_list = _lists_by_key(file)
    wrapper = next((key for key in WRAPPERS if is_list.get(key)), None)
    if wrapper is None:
        yield from _single_row(file)
        return
    if others := [f'"{key}"' for key in is_list if key != wrapper]:
        log(f'{file.name}: the rows are those of "{wrapper}"; {", ".join(others)} is left out')
    text = JsonText(file.name, file.chunks(), _DECODER)
    for key in text.keys():  # noqa: SIM118  # not a dictionary's
        if key == wrapper:
            yield from _array_rows(file.name, text)
            return
        _skip(file.name, text)


def _lists_by_key(file: RawFile) -> dict[str, bool]:
    """Return for each key of an object whether its value is a list, once all of the file has proved to be JSON."""
    text = JsonText(file.name, file.chunks(), _DECODER)
    is_list: dict[str, bool] = {}
    for key in text.keys():  # noqa: SIM118  # not a dictionary's
        if key in is_list:
            raise LitLoraError(f'{file.name}: the key "{key}" is given twice')
        is_list[key] = text.peek() == "["
        _skip(file.name, text)
    text.end()
    return is_list


def _skip(name: str, text: JsonText) -> None:
    """Read a value, a list element by element."""
    if text.peek() == "[":
        for _ in _array_rows(name, text):
            pass
        return
    _read_value(name, text)


def _single_row(file: RawFile) -> Rows:
    text = JsonText(file.name, file.chunks(), _DECODER)
    row = _read_value(file.name, text)
    text.end()
    yield f"{file.name} row 1", row


def _read_value(name: str, text: JsonText) -> Any:
    try:
        return text.value()
    except RowError as error:
        raise LitLoraError(f"{name}: {error}") from error


def _csv_rows(file: RawFile) -> Rows:
    csv.field_size_limit(MAX_CELL)  # the default refuses cells above 128 KiB
    reader, skipped = _csv_reader(file)
    line = skipped
    columns: list[str] = []
    try:
        for cells in reader:
            if any(cells) and columns:  # spreadsheets write rows of empty cells below the others
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
    return "\t" if suffix.lower().startswith(".tsv") and "\t" in header else max(DELIMITERS, key=header.count)


def _text_lines(file: RawFile) -> Iterator[str]:
    for number, line in enumerate(file.lines(), start=1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise LitLoraError(f"{file.name} line {number}: {not_utf8(error)}") from error


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
            table = parquet.ParquetFile(opened, buffer_size=BUFFER, pre_buffer=False)
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


def _packed_rows(file: RawFile) -> Rows:
    """Yield the rows of a .gz file whose name tells no format: JSON if it begins so, else CSV."""
    yield from _json_rows(file) if _first_character(file) in (b"{", b"[") else _csv_rows(file)


TEXTS: dict[str, Callable[[RawFile], Rows]] = {
    ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows,
}  # fmt: skip
FORMATS = {**TEXTS, ".parquet": _parquet_rows, **{f"{suffix}.gz": parser for suffix, parser in TEXTS.items()}}
"""Parsers by the end of a file's name."""
PARSERS = {**FORMATS, ".gz": _packed_rows}
