import json
from pathlib import Path

import numpy as np
import pytest

from litlora.__main__ import main
from litlora.data.dataset import read_examples, split
from litlora.data.duplicates import Fingerprints, keep_groups_together
from litlora.data.readers.row_formats import ANY

SAME = [
    {"instruction": "Say hi.", "output": "Hi!"},
    {"question": "Say hi.", "answer": "Hi!", "id": 7},
    {"messages": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi!"}]},
    {"conversations": [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi!"}]},
]
NEAR = [{"instruction": "say  hi", "output": "HI"}, {"instruction": 'Say "hi"!', "output": "hi."}]
OTHERS = [
    {"instruction": "Say hi.", "output": "Ho!"}, {"instruction": "Say hi. Hi!", "output": ""},
    {"instruction": "Say hi.", "output": "Hi!", "system": "Be kind."}, {"text": "?"}, {"text": "!"},
]  # fmt: skip


def fingerprints(rows):
    prints = Fingerprints()
    for row in rows:
        prints.append(ANY.parse(row).example)
    return prints


def test_duplicates_are_recognized_in_any_format():
    prints = fingerprints([*SAME, *NEAR, *OTHERS])
    assert len(set(prints.exact[: len(SAME)])) == 1
    assert len(set(prints.exact)) == 1 + len(NEAR) + len(OTHERS)
    assert len(set(prints.near[: len(SAME + NEAR)])) == 1
    assert prints.near[0] not in prints.near[len(SAME + NEAR) + 2 :]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that prepares rows, and returns the questions of both splits."""
    monkeypatch.chdir(tmp_path)

    def run(rows, *flags):
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(["prepare_json", "--source", "rows.jsonl", "--destination_path", "out", *flags]) == 0
        return [
            [e.turns[0].instruction for e in read_examples(Path("out", f"{name}.jsonl"))] for name in ("train", "val")
        ]

    return run


def distinct(count, name="question"):
    return [{"prompt": f"{name} {number}", "completion": "x"} for number in range(count)]


def test_duplicates_on_both_sides_are_reported(run, capsys):
    train, val = run(SAME[:1] * 8, "--val_split_fraction", "0.25")
    assert (len(train), len(val)) == (6, 2)
    assert (
        "2 of 2 validation rows are training rows as well, the first in line 1 of val.jsonl: "
        "the validation loss will be too good; --deduplicate true separates them\n"
    ) in capsys.readouterr().err
    run(distinct(20))
    assert "validation rows are" not in capsys.readouterr().err


def test_near_duplicates_on_both_sides_are_reported(run, capsys):
    shouted = [{"prompt": row["prompt"].upper() + "!", "completion": "x"} for row in distinct(5)]
    train, val = run(distinct(5) + shouted, "--val_split_fraction", "0.5")
    words = [[question.strip("!").casefold() for question in split] for split in (train, val)]
    leaks = sum(word in words[0] for word in words[1])
    assert leaks
    expected = f"{leaks} of 5 validation rows are training rows as well ({leaks} of them up to case and punctuation), "
    assert expected in capsys.readouterr().err


def test_exact_duplicates_are_removed(run, capsys):
    train, val = run([*SAME * 3, *distinct(7)], "--deduplicate", "true", "--val_split_fraction", "0.25")
    assert sorted(train + val) == sorted(["Say hi.", *(row["prompt"] for row in distinct(7))])
    assert "11 rows are left out, since they repeat another\n" in capsys.readouterr().err
    assert not set(train) & set(val)


@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_stay_on_one_side(run, seed, capsys):
    rows = [{"prompt": f"{text} {number}", "completion": "x"} for number in range(20) for text in ("Q", "q?", "q -")]
    train, val = run(rows, "--deduplicate", "true", "--val_split_fraction", "0.3", "--seed", str(seed))
    numbers = [{int(question.split()[-1].strip("-")) for question in split} for split in (train, val)]
    assert (len(train), len(val)) == (42, 18)
    assert not numbers[0] & numbers[1]
    assert "validation rows are" not in capsys.readouterr().err


def test_distinct_rows_are_split_as_without_the_flag(run):
    assert run(distinct(50), "--deduplicate", "true") == run(distinct(50))
    train, val = split(50, 0.1, 42)
    together = keep_groups_together(train, val, np.arange(50, dtype=np.uint64))
    assert [rows.tolist() for rows in together] == [train.tolist(), val.tolist()]


def test_training_rows_of_an_own_validation_file_are_removed(run):
    near = {"prompt": "Question, 3!", "completion": "x"}
    Path("val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*distinct(3), *distinct(1)]))
    train, val = run([*distinct(6), near], "--val_source", "val.jsonl", "--deduplicate", "true")
    assert val == ["question 0", "question 1", "question 2"]
    assert train == ["question 3", "question 4", "question 5", "Question, 3!"]
    Path("val.jsonl").write_text(json.dumps(distinct(4)[3]) + "\n")
    train, val = run([*distinct(6), near], "--val_source", "val.jsonl", "--deduplicate", "true")
    assert train == ["question 0", "question 1", "question 2", "question 4", "question 5"]


def test_rows_that_are_all_alike_cannot_be_split(run, capsys):
    with pytest.raises(AssertionError):
        run([*SAME, *NEAR], "--deduplicate", "true", "--val_split_fraction", "0.5")
    assert (
        "litlora: --deduplicate leaves no row for validation: the rows differ in case and " in capsys.readouterr().err
    )
