import pytest

from litlora.data.readers import RawFile, RowError, parse_rows
from litlora.errors import LitLoraError


def rows(suffix, content):
    return list(parse_rows(RawFile(f"data{suffix}", suffix, content)))


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
        (b'{"a": "\xe9t\xe9"}', "the byte 0xe9 is not valid UTF-8; save the file as UTF-8"),
    ],
)
def test_invalid_line_becomes_its_error(line, problem):
    (_, before), (place, error), (_, after) = rows(".jsonl", b"[1]\n" + line + b"\n[2]")
    assert (before, after) == ([1], [2])
    assert place == "data.jsonl line 2"
    assert isinstance(error, RowError)
    assert str(error) == problem


@pytest.mark.parametrize("content", [b"[" * 100_000, b"1" * 5_000], ids=["nesting", "digits"])
def test_extreme_json_is_refused(content):
    ((_, error),) = rows(".jsonl", content)
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


def test_json_lines_in_a_json_file_are_refused():
    assert refusal(".json", b'{"a": 1}\n{"a": 2}') == (
        "data.json is not valid JSON (Extra data: line 2 column 1 (char 9)); "
        "if it holds one row per line, name it .jsonl"
    )


def test_json_file_must_hold_a_list():
    assert refusal(".json", b'{"data": []}') == "data.json holds an object, but it must be a list of rows"


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_invalid_utf8_is_named_by_line(suffix):
    problem = "the byte 0xff is not valid UTF-8; save the file as UTF-8"
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
    assert refusal(".parquet", b"") == "data.parquet cannot be read: its name must end in .jsonl or .json or .csv"


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
