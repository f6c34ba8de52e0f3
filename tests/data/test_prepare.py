import hashlib
import json
from pathlib import Path

import pytest

from litlora.__main__ import main
from litlora.args.data import PrepareArgs
from litlora.data.dataset import read_examples
from litlora.data.prepare import prepare
from litlora.data.readers.row_formats import ANY
from litlora.errors import LitLoraError

ROWS = b"".join(b'{"prompt": "%d", "completion": "x"}\n' % number for number in range(10))


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    (tmp_path / "somewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def prepared(content, fraction=0.2, seed=42):
        Path("somewhere/rows.jsonl").write_bytes(content)
        prepare(PrepareArgs(tmp_path / "out", "somewhere/rows.jsonl", fraction, seed=seed), ANY)
        return tmp_path / "out"

    return prepared


def test_prepared_data_has_every_row_and_its_origin(prepared, capsys):
    out = prepared(ROWS)
    train, val = read_examples(out / "train.jsonl"), read_examples(out / "val.jsonl")
    assert sorted(int(example.turns[0].instruction) for example in train + val) == list(range(10))
    assert json.loads((out / "dataset.json").read_bytes()) == {
        "source": "somewhere/rows.jsonl",
        "sha256": hashlib.sha256(ROWS).hexdigest(),
        "rows": 10,
        "train": 8,
        "val": 2,
        "val_split_fraction": 0.2,
        "seed": 42,
    }
    assert sorted(path.name for path in out.iterdir()) == ["dataset.json", "train.jsonl", "val.jsonl"]
    assert capsys.readouterr() == ("", f"8 training and 2 validation examples in {out}\n")


def test_seed_selects_validation_rows(prepared):
    kept = {seed: read_examples(prepared(ROWS, seed=seed) / "val.jsonl") for seed in (1, 2)}
    assert kept[1] != kept[2]
    assert read_examples(prepared(ROWS, seed=1) / "val.jsonl") == kept[1]


EMPTY = b'{"prompt": "a", "completion": ""}\n'
UNANSWERED = (
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},'
    b' {"role": "user", "content": "c"}]}\n'
)


def test_empty_outputs_are_reported(prepared, capsys):
    out = prepared(ROWS + EMPTY + ROWS.replace(b"x", b"y") + EMPTY.replace(b"a", b"b"))
    assert capsys.readouterr().err.splitlines() == [
        "2 rows with an empty output, the first at somewhere/rows.jsonl line 11: it teaches the model to stop at once",
        f"18 training and 4 validation examples in {out}",
    ]


def test_unanswered_messages_are_reported(prepared, capsys):
    out = prepared(UNANSWERED + ROWS)
    assert capsys.readouterr().err.splitlines() == [
        "1 row ending in a user message without a response, the first at somewhere/rows.jsonl line 1: "
        "that message is left out",
        f"9 training and 2 validation examples in {out}",
    ]


def test_nothing_is_written_if_a_row_is_invalid(prepared, tmp_path):
    with pytest.raises(LitLoraError, match="line 11: "):
        prepared(ROWS + b"nonsense")
    with pytest.raises(LitLoraError, match="leaves no row for validation"):
        prepared(ROWS, fraction=0.01)
    assert not (tmp_path / "out").exists()


def test_destination_that_is_a_file_is_refused(prepared, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(LitLoraError) as refused:
        prepared(ROWS)
    assert str(refused.value) == f"cannot write {tmp_path / 'out'}: Not a directory"
    assert (tmp_path / "out").read_text() == "mine"


def rows(name, count=10):
    return "".join(f'{{"prompt": "{name} {number}", "completion": "x"}}\n' for number in range(count))


def questions(path):
    return [example.turns[0].instruction for example in read_examples(Path(path))]


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Work in a folder with the files a.jsonl, b.jsonl and c.jsonl of 10, 30 and 6 rows."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 10), ("b", 30), ("c", 6)):
        Path(f"{name}.jsonl").write_text(rows(name, count))


def run(*flags):
    return main(["prepare_json", "--destination_path", "out", *flags])


def test_rows_of_several_sources_are_split_together(sources):
    assert run("--source", "a.jsonl", "--source", "b.jsonl", "--val_split_fraction", "0.25") == 0
    train, val = questions("out/train.jsonl"), questions("out/val.jsonl")
    assert sorted(train + val) == sorted([*(f"a {n}" for n in range(10)), *(f"b {n}" for n in range(30))])
    assert (len(train), len(val)) == (30, 10)
    about = json.loads(Path("out/dataset.json").read_bytes())
    assert [source["source"] for source in about["sources"]] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [((1, 1), (10, 10)), ((0.25, 0.75), (10, 30)), ((0.5, 0.25), (10, 5)), ((0.1, 0.9), (3, 30)), ((2, 1), (10, 5))],
)
def test_weights_are_shares_of_the_mixture(sources, weights, counts, capsys):
    """The mixture is as large as it can be without a row twice: one of the sources is used up."""
    run("--source", f"a.jsonl={weights[0]}", "--source", f"b.jsonl={weights[1]}", "--val_split_fraction", "0.2")
    asked = questions("out/train.jsonl") + questions("out/val.jsonl")
    assert len(set(asked)) == len(asked)
    assert tuple(sum(question.startswith(name) for question in asked) for name in "ab") == counts
    assert f"{counts[1]} of 30 rows of b.jsonl, by its weight of {weights[1]:g}\n" in capsys.readouterr().err


def test_weights_for_some_sources_only_are_refused(sources, capsys):
    assert run("--source", "a.jsonl=0.5", "--source", "b.jsonl") == 1
    assert "give each source a weight, such as rows.jsonl=0.7, or none of them" in capsys.readouterr().err
    assert run("--source", "a.jsonl=0", "--source", "b.jsonl=1") == 1
    assert "a weight of --source must be above 0" in capsys.readouterr().err


def test_own_validation_rows_are_all_the_validation_rows(sources, capsys):
    assert run("--source", "a.jsonl", "--val_source", "c.jsonl") == 0
    assert questions("out/train.jsonl") == [f"a {number}" for number in range(10)]
    assert questions("out/val.jsonl") == [f"c {number}" for number in range(6)]
    assert "10 training and 6 validation examples in out\n" in capsys.readouterr().err
    about = json.loads(Path("out/dataset.json").read_bytes())
    assert about["val_sources"] == [{"source": "c.jsonl", "sha256": hashlib.sha256(rows("c", 6).encode()).hexdigest()}]
    assert "val_split_fraction" not in about
    Path("c.jsonl").write_text(rows("c", 2) + "nonsense\n")
    assert run("--source", "a.jsonl", "--val_source", "c.jsonl") == 1
    assert "litlora: c.jsonl line 3: this is not valid JSON" in capsys.readouterr().err
    assert run("--source", "a.jsonl", "--val_source", "d.jsonl") == 1
    assert "there is no file d.jsonl; give --val_source a file, " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train.jsonl", "val.jsonl", "dataset.json"])
@pytest.mark.parametrize("flag", ["--source", "--val_source"])
@pytest.mark.parametrize("way", ["same", "link", "prepared"])
def test_source_is_never_overwritten(name, flag, way, sources, capsys):
    if way == "prepared":
        assert run("--source", "a.jsonl") == 0
    Path("out").mkdir(exist_ok=True)
    content = rows("mine", 12) if name != "dataset.json" else json.dumps([json.loads(rows("mine", 1))])
    path = Path("out", name)
    path.write_text(content)
    given = Path("link" + path.suffix) if way == "link" else path
    if way == "link":
        given.symlink_to(path)
    capsys.readouterr()
    others = [] if flag == "--source" else ["--source", "a.jsonl"]
    assert run(flag, str(given), *others) == 1
    assert capsys.readouterr().err == (
        f"litlora: the source {given} would be overwritten: choose another --destination_path\n"
    )
    assert path.read_text() == content


@pytest.mark.parametrize("name", ["train.jsonl", "val.jsonl", "dataset.json"])
def test_file_that_litlora_did_not_write_is_never_overwritten(name, sources, capsys):
    Path("out").mkdir()
    Path("out", name).write_text('{"my": "own"}')
    assert run("--source", "a.jsonl") == 1
    assert capsys.readouterr().err == (
        f"litlora: out/{name} was not written by litlora and would be overwritten: "
        "choose another --destination_path, or move it away\n"
    )
    assert [(path.name, path.read_text()) for path in Path("out").iterdir()] == [(name, '{"my": "own"}')]
    Path("out", name).unlink()
    assert run("--source", "a.jsonl") == run("--source", "b.jsonl") == 0
    assert len(questions("out/train.jsonl")) == 27


def test_home_folder_is_found(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("run.yaml").write_text("source: ~/a.jsonl\nval_source: ~/c.jsonl\ndestination_path: ~/yaml\n")
    assert main(["prepare_json", "--config", "run.yaml"]) == 0
    assert main(["prepare_json", "--source=~/a.jsonl", "--val_source=~/c.jsonl", "--destination_path=~/flag"]) == 0
    assert questions("yaml/val.jsonl") == questions("flag/val.jsonl") == [f"c {number}" for number in range(6)]


def test_sources_are_a_list_in_a_yaml_file(sources):
    Path("run.yaml").write_text("source: [a.jsonl=1, b.jsonl=1]\nval_source: [c.jsonl]\n")
    assert run("--config", "run.yaml") == 0
    assert len(questions("out/train.jsonl")) == 20


@pytest.mark.parametrize("name", ["# a", "[1]", "null", "2024-01-01", "{a: 1}", "[a, b]", "1e3", "'a'", "true"])
def test_texts_of_flags_are_taken_literally(name, sources, tmp_path):
    Path(f"{name}.jsonl").write_text(rows("mine"))
    Path("none.csv").write_text(f'"{name}";"answer {name}"\n' + "a;b\n" * 10)
    assert main(["prepare_json", "--source", f"{name}.jsonl", "--destination_path", name]) == 0
    assert len(questions(Path(name, "train.jsonl"))) == 9
    columns = f"instruction={name},output=answer {name}"
    if "," not in name:
        assert run("--source", "none.csv", "--columns", columns) == 0
        assert questions("out/val.jsonl") == ["a"]
