import json

import pytest
import torch

from litlora.data.examples import ANY, Example, Turn, read_examples, split, write_dataset
from litlora.errors import LitLoraError

ROW = '{"instruction": "Say hi.", "input": "", "output": "Hi."}'


@pytest.fixture
def read(tmp_path):
    def read(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
        return read_examples(path)

    return read


@pytest.fixture
def refusal(read, tmp_path):
    def refusal(*rows):
        with pytest.raises(LitLoraError) as refused:
            read(*rows)
        return str(refused.value).removeprefix(f"{tmp_path}/")

    return refusal


def conversation(*said, system=()):
    roles = ["system"] * len(system) + ["user", "assistant"] * len(said)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, (*system, *said), strict=False)]}


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, Example((Turn("a", "c", "b"),))),
        ({"instruction": "a", "output": "c"}, Example((Turn("a", "c"),))),
        ({"instruction": "a", "input": None, "output": ""}, Example((Turn("a", ""),))),
        ({"prompt": "a", "completion": "c", "id": 7}, Example((Turn("a", "c"),))),
        (conversation("a", "b"), Example((Turn("a", "b"),))),
        (conversation("a", "b", "c", "d", system=["s"]), Example((Turn("a", "b"), Turn("c", "d")), "s")),
        (conversation("a", "b", "c"), Example((Turn("a", "b"),))),
        ('{"instruction": "x", "output": "c", "instruction": "a"}', Example((Turn("a", "c"),))),
    ],
)
def test_rows_of_all_formats_are_parsed(read, row, example):
    assert read(row) == [example]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("Say hi.", "this is not valid JSON (Expecting value at column 1)"),
        (["Say hi.", "Hi."], "this is a list, not an object"),
        ({"instruction": "a"}, 'there is no "output"'),
        ({"output": "a"}, 'there is no "instruction"'),
        ({"prompt": "a", "output": "b"}, 'there is no "instruction"'),
        ({"completion": "a"}, 'there is no "prompt"'),
        ({"instruction": "a", "output": 4}, '"output" is a number, not a string'),
        ({"instruction": "a", "output": None}, '"output" is null, not a string'),
        ({"instruction": True, "output": "a"}, '"instruction" is a boolean, not a string'),
        ({"instruction": "a", "input": ["b"], "output": "c"}, '"input" is a list, not a string'),
        ({"question": "a", "answer": "b"}, "the keys ['question', 'answer'] match no row format"),
        ({"messages": "a"}, '"messages" is a string, not a list'),
        ({"messages": []}, "the conversation has no response"),
        ({"messages": ["a"]}, "message 1: this is a string, not an object"),
        ({"messages": [{"role": "user"}]}, 'message 1: there is no "content"'),
        (conversation("a"), "the conversation has no response"),
        (conversation(system=["a"]), "the conversation has no response"),
        (conversation("a", None), 'message 2: "content" is null, not a string'),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "message 1: the role 'tool' is not system, user or assistant",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            "message 1: the role is assistant, but it is the user's turn",
        ),
        (
            {"messages": [{"role": role, "content": "a"} for role in ("system", "user", "user")]},
            "message 3: the role is user, but it is the assistant's turn",
        ),
        (
            {"messages": [{"role": role, "content": "a"} for role in ("user", "system", "assistant")]},
            "message 2: only the first message may be the system's",
        ),
        (
            '{"instruction": "a", "output": "b\\ud83d"}',
            '"output" holds \\ud83d, an unpaired surrogate, which UTF-8 cannot encode',
        ),
    ],
)
def test_invalid_row_is_named_by_file_and_line(refusal, row, problem):
    assert refusal(ROW, row) == f"rows.jsonl line 2: {problem}; a row must look like {ANY.shape}"


def test_first_invalid_row_is_named_and_others_counted(refusal):
    assert refusal("1", ROW, "nonsense", {"messages": []}).startswith(
        "rows.jsonl line 1: this is a number, not an object (invalid rows after it: 2); a row must look like {"
    )


def test_file_without_rows_is_refused(refusal):
    assert refusal("", "  ").startswith("rows.jsonl holds no rows; a row must look like {")


def test_missing_split_names_the_prepare_command(tmp_path):
    with pytest.raises(LitLoraError) as refused:
        read_examples(tmp_path / "train.jsonl")
    assert str(refused.value) == (
        f"no train.jsonl in {tmp_path}; prepare one with: "
        f"litlora prepare_json --source FILE --destination_path {tmp_path}"
    )


def numbered(count):
    return [Example((Turn(str(number), ""),)) for number in range(count)]


def test_alpaca_cleaned_splits_as_published():
    train, val = split(numbered(51_759), val_split_fraction=0.03865, seed=42)
    assert (len(train), len(val)) == (49_759, 2_000)


@pytest.mark.parametrize(("count", "fraction", "seed"), [(1_030, 0.1, 42), (7, 0.5, 1), (850, 0.03865, 1337)])
def test_split_equals_torch_random_split(count, fraction, seed):
    examples = numbered(count)
    generator = torch.Generator().manual_seed(seed)
    expected = torch.utils.data.random_split(examples, [1 - fraction, fraction], generator=generator)
    assert split(examples, fraction, seed) == tuple(list(part) for part in expected)


@pytest.mark.parametrize(("count", "fraction"), [(3, 0.3), (1, 0.9)])
def test_split_without_validation_rows_is_refused(count, fraction):
    with pytest.raises(LitLoraError) as refused:
        split(numbered(count), fraction, seed=42)
    assert str(refused.value) == (
        f"--val_split_fraction ({fraction}) leaves no row for validation ({count} in all); "
        "choose a larger fraction or add rows"
    )


def test_training_split_is_never_empty():
    for count in range(2, 70):
        assert len(split(numbered(count), 1 - 2**-53, seed=42)[0]) == 1


AWKWARD = ' tab\tquote" slash\\ 你好 🙂 cr\r nl\n nul\0 ls\u2028 nel\u0085 bom\ufeff\n'


def test_written_examples_read_back_equal(tmp_path):
    train = [
        Example((Turn(AWKWARD, AWKWARD, AWKWARD),)),
        Example((Turn("", ""),)),
        Example((Turn(AWKWARD, ""), Turn("", AWKWARD)), AWKWARD),
        Example((Turn("a", "b"), Turn("c", "d"))),
        Example((Turn("a", "b"),), "system"),
    ]
    val = [Example((Turn("v", "w"),))]
    write_dataset(tmp_path, train, val, {})
    assert read_examples(tmp_path / "train.jsonl") == train
    assert read_examples(tmp_path / "val.jsonl") == val


def test_single_turns_are_written_with_alpaca_keys(tmp_path):
    write_dataset(tmp_path / "new", [Example((Turn("你好", "🙂"),))], numbered(2), {"source": "é"})
    assert (tmp_path / "new/train.jsonl").read_bytes().decode() == (
        '{"instruction": "你好", "input": "", "output": "🙂"}\n'
    )
    facts = (tmp_path / "new/dataset.json").read_bytes().decode()
    assert json.loads(facts) == {"source": "é", "rows": 3, "train": 1, "val": 2}
    assert "é" in facts


def test_source_name_need_not_be_utf8(tmp_path):
    write_dataset(tmp_path, numbered(1), numbered(1), {"source": "rows\udcff.json"})
    assert json.loads((tmp_path / "dataset.json").read_bytes())["source"] == "rows\udcff.json"


def test_input_in_a_conversation_is_refused(tmp_path):
    example = Example((Turn("a", "b", "input"), Turn("c", "d")))
    with pytest.raises(ValueError, match="cannot hold an input"):
        write_dataset(tmp_path, [example], [example], {})
    assert list(tmp_path.iterdir()) == []
