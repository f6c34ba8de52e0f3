import json

import pytest
import torch

from litlora.data.dataset import read_examples, split, write_dataset
from litlora.data.examples import Example, Turn
from litlora.data.readers.row_store import to_line
from litlora.errors import LitLoraError


def lines(examples):
    return [to_line(example) for example in examples]


def test_missing_split_names_the_prepare_command(tmp_path):
    with pytest.raises(LitLoraError) as refused:
        read_examples(tmp_path / "train.jsonl")
    assert str(refused.value) == (
        f"no train.jsonl in {tmp_path}; prepare one with: "
        f"litlora prepare_json --source FILE --destination_path {tmp_path}"
    )


def numbered(count):
    return [Example.of(Turn(str(number), "")) for number in range(count)]


def test_alpaca_cleaned_splits_as_published():
    train, val = split(51_759, val_split_fraction=0.03865, seed=42)
    assert (len(train), len(val)) == (49_759, 2_000)


@pytest.mark.parametrize(
    ("count", "fraction", "seed"),
    [(1_030, 0.1, 42), (7, 0.5, 1), (850, 0.03865, 1337), (2, 0.5, 0), (70_001, 0.3, 2**32 + 5), (99, 0.2, 2**63 - 1)],
)
def test_split_equals_torch_random_split(count, fraction, seed):
    generator = torch.Generator().manual_seed(seed)
    expected = torch.utils.data.random_split(range(count), [1 - fraction, fraction], generator=generator)
    assert [part.tolist() for part in split(count, fraction, seed)] == [list(part) for part in expected]


@pytest.mark.parametrize(("count", "fraction"), [(3, 0.3), (1, 0.9)])
def test_split_without_validation_rows_is_refused(count, fraction):
    with pytest.raises(LitLoraError) as refused:
        split(count, fraction, seed=42)
    assert str(refused.value) == (
        f"--val_split_fraction ({fraction}) leaves no row for validation ({count} in all); "
        "choose a larger fraction or add rows"
    )


def test_training_split_is_never_empty():
    for count in range(2, 70):
        assert len(split(count, 1 - 2**-53, seed=42)[0]) == 1


AWKWARD = ' tab\tquote" slash\\ 你好 🙂 cr\r nl\n nul\0 ls\u2028 nel\u0085 bom\ufeff\n'


def test_written_examples_read_back_equal(tmp_path):
    train = [
        Example.of(Turn(AWKWARD, AWKWARD, AWKWARD)),
        Example.of(Turn("", "")),
        Example.of(Turn(AWKWARD, ""), Turn("", AWKWARD), system=AWKWARD),
        Example.of(Turn("a", "b"), Turn("c", "d")),
        Example.of(Turn("a", "b"), system="system"),
    ]
    val = [Example.of(Turn("v", "w"))]
    write_dataset(tmp_path, lines(train), lines(val), {})
    assert read_examples(tmp_path / "train.jsonl") == train
    assert read_examples(tmp_path / "val.jsonl") == val


def test_single_turns_are_written_with_alpaca_keys(tmp_path):
    write_dataset(tmp_path / "new", lines([Example.of(Turn("你好", "🙂"))]), lines(numbered(2)), {"source": "é"})
    assert (tmp_path / "new/train.jsonl").read_bytes().decode() == (
        '{"instruction": "你好", "input": "", "output": "🙂"}\n'
    )
    facts = (tmp_path / "new/dataset.json").read_bytes().decode()
    assert json.loads(facts) == {"source": "é", "rows": 3, "train": 1, "val": 2}
    assert "é" in facts


def test_source_name_need_not_be_utf8(tmp_path):
    write_dataset(tmp_path, lines(numbered(1)), lines(numbered(1)), {"source": "rows\udcff.json"})
    assert json.loads((tmp_path / "dataset.json").read_bytes())["source"] == "rows\udcff.json"


def test_input_before_the_last_question_is_refused():
    example = Example.of(Turn("a", "b", "input"), Turn("c", "d"))
    with pytest.raises(ValueError, match="can hold an input"):
        to_line(example)
