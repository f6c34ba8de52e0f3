"""dataset.json says which source each validation row comes from."""

import json
from functools import partial
from pathlib import Path

import pytest

from litlora.__main__ import main
from litlora.data.dataset import read_examples
from litlora.data.row_sources import KEY, ONE_SOURCE, about_sources, read_row_sources

VAL = Path("out/val.jsonl")


@pytest.fixture(autouse=True)
def sources(tmp_path, monkeypatch) -> None:
    """Work in a folder with the files a.jsonl, b.jsonl and c.jsonl of 10, 30 and 6 rows."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 10), ("b", 30), ("c", 6)):
        rows = (f'{{"prompt": "{name}.jsonl {number % 25}", "completion": "x"}}\n' for number in range(count))
        Path(f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")


def prepare(*flags: str) -> None:
    assert main(["prepare_json", "--destination_path", "out", *flags]) == 0


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--source", "a.jsonl", "--source", "b.jsonl"], {"a.jsonl", "b.jsonl"}),
        (["--source", "b.jsonl=1", "--source", "a.jsonl=1"], {"a.jsonl", "b.jsonl"}),
        (["--source", "a.jsonl", "--source", "b.jsonl", "--deduplicate", "true"], {"a.jsonl", "b.jsonl"}),
        (["--source", "a.jsonl", "--val_source", "b.jsonl", "--val_source", "c.jsonl"], {"b.jsonl", "c.jsonl"}),
    ],
)
def test_each_row_has_its_source(flags, names):
    prepare(*flags, "--val_split_fraction", "0.4")
    found = read_row_sources(VAL)
    by_line = [found.names[found.of_line(line)] for line in range(1, len(found.rows) + 1)]
    assert by_line == [example.turns[0].instruction.split()[0] for example in read_examples(VAL)]
    assert set(by_line) == names


@pytest.mark.parametrize("flags", [[], ["--val_source", "c.jsonl"], ["--source", "b.jsonl", "--val_source", "c.jsonl"]])
def test_rows_of_one_source_need_no_entry(flags):
    prepare("--source", "a.jsonl", *flags)
    assert KEY not in json.loads(Path("out/dataset.json").read_bytes())
    assert read_row_sources(VAL) == ONE_SOURCE


def drop_a_row() -> None:
    VAL.write_bytes(VAL.read_bytes().partition(b"\n")[2])


def swap_rows() -> None:
    VAL.write_bytes(b"".join(sorted(VAL.read_bytes().splitlines(keepends=True))))


def spoil(**keys: object) -> None:
    path = Path("out/dataset.json")
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps(content | {KEY: content[KEY] | keys}), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        drop_a_row,
        swap_rows,
        *(partial(spoil, rows=rows) for rows in ("7 x", "0x999999999999", f"0x{'9' * 40}", None)),
        partial(spoil, sources=["a"]),
    ],
)
def test_changed_rows_have_no_sources(change, capsys):
    prepare("--source", "a.jsonl", "--source", "b.jsonl", "--val_split_fraction", "0.4")
    capsys.readouterr()
    change()
    assert read_row_sources(VAL) == ONE_SOURCE
    assert capsys.readouterr().err == (
        "out/val.jsonl has changed since it was prepared: its loss is not reported by source\n"
    )


def test_sources_are_stored_in_few_bytes():
    about = about_sources(["a"] * 5000 + ["b"] * 5000 + ["a"], [])
    assert about[KEY]["rows"] == "0x5000 1x5000 0"
