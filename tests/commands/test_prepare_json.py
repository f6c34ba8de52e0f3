import json
from pathlib import Path

import pytest

from litlora import __version__
from litlora.__main__ import main
from litlora.args.data import PrepareJsonArgs
from litlora.commands.prepare_json import prepare_json
from litlora.data.dataset import read_examples
from litlora.data.examples import Example, Turn
from litlora.errors import LitLoraError

CSV = 'prompt,completion\n"one, ""two""\nthree",4\nfive,six\n'
PAIRS = [{"prompt": 'one, "two"\nthree', "completion": "4"}, {"prompt": "five", "completion": "six"}]
CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
}


@pytest.fixture
def prepared(tmp_path):
    def prepared(name, content):
        source, out = tmp_path / name, tmp_path / "out"
        source.write_text(content)
        prepare_json(PrepareJsonArgs(destination_path=out, source=str(source), val_split_fraction=0.5))
        return read_examples(out / "train.jsonl") + read_examples(out / "val.jsonl")

    return prepared


def test_csv_json_and_jsonl_give_the_same_examples(prepared):
    examples = prepared("rows.csv", CSV)
    assert set(examples) == {Example.of(Turn('one, "two"\nthree', "4")), Example.of(Turn("five", "six"))}
    assert prepared("rows.json", json.dumps(PAIRS)) == examples
    assert prepared("rows.jsonl", "\n".join(json.dumps(row) for row in PAIRS)) == examples


def test_row_formats_may_be_mixed(prepared):
    rows = [CONVERSATION, PAIRS[1], {"instruction": "a", "output": "b"}]
    assert set(prepared("rows.json", json.dumps(rows))) == {
        Example.of(Turn("a", "b"), Turn("c", "d"), system="Be brief."),
        Example.of(Turn("five", "six")),
        Example.of(Turn("a", "b")),
    }


def test_csv_without_known_columns_is_refused(prepared, tmp_path):
    with pytest.raises(LitLoraError) as refused:
        prepared("rows.csv", "q;a\na;b\n")
    assert str(refused.value).startswith(
        f"{tmp_path}/rows.csv line 2: the keys ['q', 'a'] match no row format, "
        "and no --columns assigns them; a row must look like "
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("columns", ["instruction=Frage,output=Antwort", " instruction = Frage, output = Antwort,"])
def test_columns_and_encoding_are_flags(columns, tmp_path, capsys):
    (tmp_path / "rows.csv").write_bytes("Frage;Antwort\nWie geht’s?;Gut!\nUnd – jetzt?;Müde.\n".encode("cp1252"))
    paths = ["--source", str(tmp_path / "rows.csv"), "--destination_path", str(tmp_path / "out")]
    flags = ["--val_split_fraction", "0.5", "--columns", columns]
    assert main(["prepare_json", *paths, *flags]) == 1
    assert "rows.csv line 2: the byte 0x92 is not valid UTF-8; save" in capsys.readouterr().err
    assert main(["prepare_json", *paths, *flags, "--encoding", "cp1252"]) == 0
    examples = {*read_examples(tmp_path / "out/train.jsonl"), *read_examples(tmp_path / "out/val.jsonl")}
    assert examples == {Example.of(Turn("Wie geht’s?", "Gut!")), Example.of(Turn("Und – jetzt?", "Müde."))}


def test_names_of_columns_may_hold_commas():
    args = PrepareJsonArgs(Path("out"), "rows.csv", columns="instruction=Frage, kurz,output = Antwort, a=b")
    assert args.column_names() == {"instruction": "Frage, kurz", "output": "Antwort", "a": "b"}


@pytest.mark.parametrize("columns", ["instruction", "instruction=", "=Frage", "instruction:Frage"])
def test_columns_must_be_pairs(columns):
    with pytest.raises(LitLoraError, match="must be pairs such as instruction=Frage,output=Antwort"):
        prepare_json(PrepareJsonArgs(destination_path=Path("out"), source="rows.csv", columns=columns))


def test_command_logs_to_stderr(litlora, tmp_path):
    (tmp_path / "rows.csv").write_text(CSV)
    out = tmp_path / "out"
    done = litlora(
        "prepare_json", "--source", tmp_path / "rows.csv", "--destination_path", out, "--val_split_fraction", 0.5
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == (
        f"litlora {__version__}: prepare_json\n1 training and 1 validation examples in {out}\n"
        f"next: litlora finetune_lora CHECKPOINT --data_dir {out}\n"
    )


def test_invalid_row_ends_the_command_with_one_sentence(litlora, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    done = litlora("prepare_json", "--source", tmp_path / "rows.jsonl", "--destination_path", tmp_path / "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert f'{tmp_path}/rows.jsonl line 2: there is no "completion"; a row must look like ' in done.stderr
    assert done.stderr.startswith(f"litlora {__version__}: prepare_json\n")
    assert done.stderr.count("\n") == 2
    assert not (tmp_path / "out").exists()
