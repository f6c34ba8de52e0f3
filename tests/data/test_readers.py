import gzip
import io
import json
import sys
import tracemalloc
from dataclasses import replace

import pyarrow
import pytest
from pyarrow import parquet

from litlora.data.readers import json_text, parsers, raw_files
from litlora.data.readers.parsers import RowError, parse_rows
from litlora.data.readers.raw_files import RawFile
from litlora.errors import LitLoraError


def rows(suffix, content):
    return list(parse_rows(RawFile.from_bytes(f"data{suffix}", suffix, content)))


def refusal(suffix, content):
    with pytest.raises(LitLoraError) as refused:
        rows(suffix, content)
    return str(refused.value)


def test_jsonl_line_numbers_count_blank_lines():
    assert rows(".jsonl", b'{"a": 1}\r\n\n  \n{"a": 2}') == [
        ("data.jsonl line 1", {"a": 1}),
        ("data.jsonl line 4", {"a": 2}),
    ]


def test_line_separator_in_a_string_ends_no_line():
    text = "one\u2028two\u0085three"
    assert rows(".jsonl", f'{{"a": "{text}"}}\n'.encode()) == [("data.jsonl line 1", {"a": text})]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{'a': 1}", "this is not valid JSON (Expecting property name enclosed in double quotes at column 2)"),
        (b'{"a": 1', "this is not valid JSON (Expecting ',' delimiter at column 8)"),
        (
            b'{"a": "\xe9t\xe9"}',
            "the byte 0xe9 is not valid UTF-8; save the file as UTF-8, "
            "or prepare it with its encoding, such as --encoding cp1252",
        ),
    ],
)
def test_invalid_line_becomes_its_error(line, problem):
    (_, before), (place, error), (_, after) = rows(".jsonl", b"1\n" + line + b"\n[2]")
    assert (before, after) == (1, [2])
    assert place == "data.jsonl line 2"
    assert isinstance(error, RowError)
    assert str(error) == problem


@pytest.mark.parametrize("content", [b"[" * 100_000, b"1" * 5_000], ids=["nesting", "digits"])
def test_extreme_json_is_refused(content):
    *_, (_, error) = rows(".jsonl", b"1\n" + content)
    assert isinstance(error, RowError)
    assert refusal(".json", content).startswith("data.json is not valid JSON (")


def test_json_rows_are_counted_from_one():
    assert rows(".json", b'[{"a": 1}, 7]') == [("data.json row 1", {"a": 1}), ("data.json row 2", 7)]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_empty_file_has_no_rows(suffix):
    assert rows(suffix, b"") == rows(suffix, b"\n") == []


@pytest.mark.parametrize(
    ("suffix", "content"), [(".json", b'[{"a": "1"}]'), (".jsonl", b'{"a": "1"}'), (".csv", b"a\n1\n")]
)
def test_byte_order_mark_and_upper_case_suffix_are_accepted(suffix, content):
    ((_, row),) = rows(suffix.upper(), b"\xef\xbb\xbf" + content)
    assert row == {"a": "1"}


@pytest.fixture(params=[4, 7, raw_files.CHUNK])
def chunk(request, monkeypatch):
    """Read files in pieces of this many bytes."""
    monkeypatch.setattr(raw_files, "CHUNK", request.param)


VALUES = [
    {"a": 'é"\\ü€', "b": [1, -2.5e-7, 10**30, [[]], {}]}, 12345, -1, 0.5, "x🙂\n", True, None, [], {"": {"": [{}]}},
]  # fmt: skip


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("indent", [None, 3])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_values_are_read_piece_by_piece(indent, ascii_only):
    content = json.dumps(VALUES, indent=indent, ensure_ascii=ascii_only).encode()
    assert [row for _, row in rows(".json", content)] == VALUES
    wrapped = json.dumps({"n": 1, "data": VALUES, "of": {"x": [1]}}, indent=indent).encode()
    assert [row for _, row in rows(".json", wrapped)] == VALUES


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("separator", ["\n", "\r\n", "\r", "\r\n\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_are_read_piece_by_piece(separator, encoding):
    lines = ["é1", "22", "", "€333", "🙂"]
    blanks = 1 if separator != "\r\n\r\n" else 2
    content = separator.join(f'{{"a": "{line}"}}' for line in lines).encode(encoding)
    assert rows(".jsonl", content) == [
        (f"data.jsonl line {blanks * number + 1}", {"a": line}) for number, line in enumerate(lines)
    ]


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson"])
def test_json_is_read_whatever_the_suffix(suffix):
    row, other = {"a": [1]}, {"a": [2]}
    assert rows(suffix, b'{"a": [1]}\n\n{"a": [2]}\n') == [
        (f"data{suffix} line 1", row),
        (f"data{suffix} line 3", other),
    ]
    for array in (b'[{"a": [1]},{"a": [2]}]', b'\n[\n{"a": [1]},\n{"a": [2]}\n]\n'):
        assert rows(suffix, array) == [(f"data{suffix} row 1", row), (f"data{suffix} row 2", other)]


@pytest.mark.parametrize("key", ["data", "rows", "train"])
@pytest.mark.usefixtures("chunk")
def test_rows_wrapped_in_an_object_are_read(key, capsys):
    assert rows(".json", f'{{"{key}": [{{"a": 1}}]}}'.encode()) == [("data.json row 1", {"a": 1})]
    assert capsys.readouterr().err == ""
    assert rows(".json", f'{{"version": 2,\n"{key}": [{{"a": 1}}]}}'.encode()) == [("data.json row 1", {"a": 1})]
    assert capsys.readouterr().err == f'data.json: the rows are those of "{key}"; "version" is left out\n'


def test_json_object_is_one_row():
    assert rows(".json", b'{\n"a": 1}') == [("data.json row 1", {"a": 1})]


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'[{"a": 1} {"a": 2}]', "Expecting ',' delimiter: line 1 column 11 (char 10)"),
        (b'[{"a": 1}', "Expecting ',' delimiter: line 1 column 10 (char 9)"),
        (b'[{"a": 1}] x', "Extra data: line 1 column 12 (char 11)"),
        (b'{"a": 1} x', "Extra data: line 1 column 10 (char 9)"),
        (b'{"data": [{"a": 1}]\n}\n{"a": 2}', "Extra data: line 3 column 1 (char 22)"),
        (b'[{"a": 1},\n {"a": tru}]', "Expecting value: line 2 column 8 (char 18)"),
        (b'[{"a": "b', "Unterminated string starting at: line 1 column 8 (char 7)"),
        (b"'a'", "Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_invalid_json_is_refused(content, problem):
    assert refusal(".json", content) == f"data.json is not valid JSON ({problem})"


@pytest.mark.usefixtures("chunk")
def test_key_given_twice_is_located():
    ((place, error),) = rows(".jsonl", b'{"a": {"b": 1, "c": 2, "b": 3}}')
    assert (place, str(error)) == ("data.jsonl line 1", 'the key "b" is given twice')
    assert refusal(".json", b'[{"a": 1}, {"a": 1, "a": 2}]') == 'data.json row 2: the key "a" is given twice'
    assert refusal(".csv", b"a,b, a\n1,2,3\n") == (
        'data.csv: the header names the column "a" twice; rename or remove one of them'
    )


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_nan_is_a_missing_value(suffix):
    ((_, row),) = rows(suffix, b'{"a": NaN, "b": [NaN]}')
    assert row == {"a": None, "b": [None]}


TABLE = "question,answer\nWie geht’s?,„Gut“ – 5 €\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
def test_encodings_are_read(suffix, encoding):
    row = {"question": "Wie geht’s?", "answer": "„Gut“ – 5 €"}
    text = json.dumps(row, ensure_ascii=False) if "json" in suffix else TABLE
    content = (text.replace(",", "\t") if suffix == ".tsv" else text).encode(encoding)
    declared = encoding if encoding == "cp1252" else None
    file = replace(RawFile.from_bytes("data", suffix, content), encoding=declared)
    assert [row for _, row in parse_rows(file)] == [row]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
@pytest.mark.parametrize(
    ("encoding", "problem"),
    [
        ("klingon", "--encoding (klingon) is unknown: give one such as cp1252, latin-1 or utf-16"),
        ("hex", "--encoding (hex) is unknown: give one such as cp1252, latin-1 or utf-16"),
        (
            "ascii",
            "data is not valid ascii ('ascii' codec can't decode byte 0xe9 in position 1: ordinal not in range(128))",
        ),
    ],
)
def test_wrong_encoding_is_refused(suffix, encoding, problem):
    file = replace(RawFile.from_bytes("data", suffix, b"\n\xe9"), encoding=encoding)
    with pytest.raises(LitLoraError) as refused:
        list(parse_rows(file))
    assert str(refused.value) == problem


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", ", ", "; "])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_csv_dialects_are_recognized(suffix, delimiter):
    lines = [["question", '"answer, the; first"', "id"], ["one?", '"a ""b"";, c|\td"', "1"], ["two?", "", "2"]]
    content = "\r\n".join(delimiter.join(line) for line in lines).encode()
    expected = [
        {"question": "one?", "answer, the; first": 'a "b";, c|\td', "id": "1"},
        {"question": "two?", "answer, the; first": "", "id": "2"},
    ]
    assert [row for _, row in rows(suffix, content)] == expected


def test_delimiter_that_excel_declares_is_used():
    assert rows(".csv", b"sep=;\r\na,b;c\r\n1;2\r\n") == [("data.csv line 3", {"a,b": "1", "c": "2"})]


def test_blanks_around_names_of_columns_do_not_count():
    assert rows(".csv", b"instruction, input ,\toutput\n a, b ,c\n") == [
        ("data.csv line 2", {"instruction": "a", "input": "b ", "output": "c"})
    ]
    assert rows(".csv", b" a ,b\n 1 , 2\n") == [("data.csv line 2", {"a": " 1 ", "b": " 2"})]


def test_column_without_a_name_is_numbered():
    assert rows(".csv", b",a\n0,x\n") == [("data.csv line 2", {"column 1": "0", "a": "x"})]


def parquet_file(table):
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()


def test_parquet_rows_are_read():
    """Objects of several kinds in one column get each other's keys from Parquet, as null."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "look"}]}]
    table = pyarrow.Table.from_pylist([{"messages": messages, "n": 1}, {"messages": None, "n": 2}])
    assert rows(".parquet", parquet_file(table)) == [
        ("data.parquet row 1", {"messages": messages, "n": 1}),
        ("data.parquet row 2", {"n": 2}),
    ]


def test_invalid_parquet_is_refused():
    assert refusal(".parquet", b"question,answer\n").startswith("data.parquet is not valid Parquet (Parquet ")
    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], ["a", "a"])
    assert refusal(".parquet", parquet_file(table)) == (
        'data.parquet: the header names the column "a" twice; rename or remove one of them'
    )


def test_parquet_without_pyarrow_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal(".parquet", b"") == "data.parquet needs pyarrow: install it with: pip install 'litlora[parquet]'"


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_invalid_utf8_is_named_by_line(suffix):
    hint = "save the file as UTF-8, or prepare it with its encoding, such as --encoding cp1252"
    problem = f"the byte 0xff is not valid UTF-8; {hint}"
    assert refusal(suffix, b"[\n\n1, \xff]") == f"data{suffix} line 3: {problem}"


def test_csv_cells_may_contain_commas_quotes_and_newlines():
    content = b'question,answer\r\n"one, ""two""\r\nthree",4\r\n\r\nfive,"\r\n"\r\n'
    assert rows(".csv", content) == [
        ("data.csv line 2", {"question": 'one, "two"\r\nthree', "answer": "4"}),
        ("data.csv line 5", {"question": "five", "answer": "\r\n"}),
    ]


def test_csv_lines_may_end_in_carriage_return():
    assert rows(".csv", b"a,b\r1,2\r") == [("data.csv line 2", {"a": "1", "b": "2"})]


def test_csv_cell_may_be_long():
    long = "x" * 1_000_000
    assert rows(".csv", f"a,b\n{long},1\n".encode()) == [("data.csv line 2", {"a": long, "b": "1"})]


def test_csv_row_with_extra_cells_is_invalid():
    ((place, error),) = rows(".csv", b"a,b\n1,2,3\n")
    assert place == "data.csv line 2"
    assert str(error) == "the row has 3 cells, but the header has 2"


def test_unterminated_csv_quote_is_located():
    assert (
        refusal(".csv", b'a,b\n1,2\n3,"4\n5,6\n') == "data.csv line 3: this is not valid CSV (unexpected end of data)"
    )


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".json.gz"])
def test_memory_does_not_grow_with_the_file(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(raw_files, "CHUNK", 1 << 16)
    lines = [f'{{"a": "{number} {"x" * 400}"}}' for number in range(8_000)]
    text = f"[{','.join(lines)}]" if "json" in suffix and suffix != ".jsonl" else "\n".join(["a", *lines])
    content = text.removeprefix("a\n").encode() if suffix == ".jsonl" else text.encode()
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(content, 1) if suffix.endswith(".gz") else content)
    tracemalloc.start()
    count = sum(1 for _ in parse_rows(RawFile.from_path(path, "missing")))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == len(lines)
    assert peak < len(content) / 3


def packed(suffix, content):
    return rows(suffix, gzip.compress(content))


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl.gz", b'{"a": "1"}\n'), (".ndjson.gz", b'{"a": "1"}\n'), (".json.gz", b'[{"a": "1"}]'),
        (".json.gz", b'{"data": [{"a": "1"}]}'), (".csv.gz", b"\xef\xbb\xbfa\n1\n"), (".TSV.GZ", b"a\n1\n"),
        (".gz", b'{"a": "1"}\n'), (".gz", b'[{"a": "1"}]'), (".gz", b"a\n1\n"), (".csv.gz", "a\n1\n".encode("utf-16")),
    ],
)  # fmt: skip
def test_gzip_files_are_read(suffix, content):
    assert [row for _, row in packed(suffix, content)] == [{"a": "1"}]
    parts = gzip.compress(content[:3]) + gzip.compress(content[3:])  # as `cat a.gz b.gz` has it
    assert [row for _, row in rows(suffix, parts)] == [{"a": "1"}]


@pytest.mark.parametrize("suffix", [".tar.gz", ".parquet.gz"])
def test_gzip_of_other_files_is_refused(suffix):
    assert "cannot be read: its name must end in .jsonl, " in refusal(suffix, b"")


def test_broken_gzip_file_is_refused():
    content = gzip.compress(b'{"a": "1"}\n' * 100)
    hint = "fetch or compress it again"
    assert refusal(".jsonl.gz", content[:-12]) == (
        "data.jsonl.gz is not a valid gzip file (Compressed file ended before the end-of-stream marker was reached): "
        f"{hint}"
    )
    for broken in (b"{}", content[:20] + b"\xff\xff" + content[22:]):
        assert refusal(".jsonl.gz", broken).startswith("data.jsonl.gz is not a valid gzip file (")


@pytest.mark.parametrize("content", [b"\n" * 4_000_000, b'{"a": "%s"}\n' % (b"x" * 10_000) * 400, b" " * 4_000_000])
def test_gzip_bomb_is_refused(content, monkeypatch):
    monkeypatch.setattr(raw_files, "UNPACKED", 1 << 21)
    with pytest.raises(
        LitLoraError, match=r"^data.jsonl.gz unpacks to more than 2 MB, over 100 times its size: unpack"
    ):
        packed(".jsonl.gz", content)


def test_large_gzip_file_of_usual_text_is_read(monkeypatch):
    monkeypatch.setattr(raw_files, "UNPACKED", 1000)
    lines = b"".join(b'{"a": "%d"}\n' % (number**9) for number in range(10_000))
    assert len(packed(".jsonl.gz", lines)) == 10_000


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_line_without_an_end_is_refused(suffix, monkeypatch):
    monkeypatch.setattr(raw_files, "MAX_ROW", 1 << 20)
    assert refusal(suffix, b'{"a": 1}\n{"a": "' + b"x" * 4_000_000) == (
        f"data{suffix} line 2 is longer than 1 MB: give each row a line of its own"
    )


def test_value_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(json_text, "MAX_ROW", 1 << 20)
    for endless in (b'"' + b"x" * 4_000_000, b'["' + b'x", "' * 1_000_000, b" " * 4_000_000):
        assert refusal(".json", b'[{"a": 1},\n{"a": ' + endless) == (
            "data.json: what begins in line 2 is longer than 1 MB: is a bracket or a quote not closed?"
        )


def test_cell_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(parsers, "MAX_CELL", 1000)
    assert refusal(".csv", b'a,b\n1,"2\n' + b"1,2\n" * 1000) == (
        "data.csv line 2: this is not valid CSV (field larger than field limit (1000))"
    )


def test_rows_of_empty_cells_are_no_rows():
    assert rows(".csv", b"a,b\n1,\n,\n,2\n,\n") == [
        ("data.csv line 2", {"a": "1", "b": ""}),
        ("data.csv line 4", {"a": "", "b": "2"}),
    ]


def test_unknown_suffix_is_refused():
    assert refusal(".xlsx", b"") == (
        "data.xlsx cannot be read: its name must end in .jsonl, .ndjson, .json, .csv, .tsv or .parquet, "
        "or as in rows.jsonl.gz"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [("folder", "Is a directory"), ("file/below", "Not a directory"), ("x" * 300, "File name too long")],
)
def test_unreadable_file_is_refused(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(LitLoraError) as refused:
        RawFile.from_path(tmp_path / name, if_missing="missing")
    assert str(refused.value) == f"cannot read {tmp_path / name}: {reason}"
