import io
import json
import sys
from dataclasses import replace

import pyarrow
import pytest
from pyarrow import parquet

from litlora.data.readers import RawFile, RowError, parse_rows
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
def test_rows_wrapped_in_an_object_are_read(key, capsys):
    assert rows(".json", f'{{"{key}": [{{"a": 1}}]}}'.encode()) == [("data.json row 1", {"a": 1})]
    assert capsys.readouterr().err == ""
    assert rows(".json", f'{{"version": 2,\n"{key}": [{{"a": 1}}]}}'.encode()) == [("data.json row 1", {"a": 1})]
    assert capsys.readouterr().err == f'data.json: the rows are those of "{key}"; "version" is left out\n'


def test_json_object_is_one_row():
    assert rows(".json", b'{\n"a": 1}') == [("data.json row 1", {"a": 1})]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'[{"a": 1} {"a": 2}]', "Expecting ',' delimiter: line 1 column 11 (char 10)"),
        (b'[{"a": 1}', "Expecting ',' delimiter: line 1 column 10 (char 9)"),
        (b'[{"a": 1}] x', "Extra data: line 1 column 11 (char 10)"),
        (b"'a'", "Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_invalid_json_is_refused(content, problem):
    assert refusal(".json", content) == f"data.json is not valid JSON ({problem})"


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


def test_unknown_suffix_is_refused():
    assert refusal(".xlsx", b"") == (
        "data.xlsx cannot be read: its name must end in .jsonl, .ndjson, .json, .csv, .tsv or .parquet"
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
