"""A run resumes on the same tensors and tokens, whatever files they lie in, and is told what differs otherwise."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from helpers.runs import report
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from litlora.__main__ import main

OUT = Path("out")
TWO, THREE = ["--train.max_steps", 2], ["--resume", "true", "--train.max_steps", 3]
TOKENIZER = Path("base/tokenizer.json")


@pytest.fixture
def stopped(tiny, data_dir, tmp_path, monkeypatch) -> None:
    """Work in a folder with a run of two steps, its base and its data."""
    shutil.copytree(tiny, tmp_path / "base")
    shutil.copytree(data_dir, tmp_path / "data", ignore=shutil.ignore_patterns("tokenized"))
    monkeypatch.chdir(tmp_path)
    assert run(*TWO) == 0
    shutil.rmtree(OUT / "final")


def run(*flags: object) -> int:
    folders = "--checkpoint_dir base --data_dir data --out_dir out --precision 32-true --eval.max_new_tokens 0"
    sizes = "--train.global_batch_size 4 --train.save_interval 1 --eval.initial_validation false"
    return main(["finetune_lora", *folders.split(), *sizes.split(), *map(str, flags)])


def refusal(capsys) -> str:
    """Return what differs, as the refusal of the run lists it."""
    capsys.readouterr()
    assert run(*THREE) == 1
    fault = capsys.readouterr().err.splitlines()[-1]
    return fault.removeprefix("litlora: --resume out/step-000002 would not continue the same run: ").partition(";")[0]


def store_in_two_files() -> None:
    tensors = load_file("base/model.safetensors")
    Path("base/model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    files = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, Path("base", file), {"made_by": "another program"})
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    Path("base/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def save_tokenizer_again() -> None:
    content = json.loads(TOKENIZER.read_bytes())
    TOKENIZER.write_text(json.dumps(dict(reversed(content.items())), indent=1), encoding="utf-8")
    settings = Path("base/tokenizer_config.json")
    content = json.loads(settings.read_bytes())
    settings.write_text(json.dumps({"clean_up_tokenization_spaces": False, **content}), encoding="utf-8")


def change_what_no_text_shows() -> None:
    content = json.loads(TOKENIZER.read_bytes())
    content["model"]["ignore_merges"] = False
    content["added_tokens"][0]["normalized"] = not content["added_tokens"][0]["normalized"]
    TOKENIZER.write_text(json.dumps(content), encoding="utf-8")


def reorder_keys() -> None:
    for path in Path("data").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps(dict(reversed(row.items()))) + "\n" for row in rows]  # characters as escapes
        path.write_text("".join(lines), encoding="utf-8")


@pytest.mark.parametrize(
    "change", [store_in_two_files, save_tokenizer_again, change_what_no_text_shows, reorder_keys, "upgrade"]
)
def test_equal_tensors_and_tokens_resume(stopped, change, monkeypatch):
    if change == "upgrade":
        monkeypatch.setattr(tokenizers, "__version__", "99.0")
    else:
        change()
    assert run(*THREE) == 0
    assert report(OUT / "final")["steps"] == 3


def swap_tokens() -> None:
    content = json.loads(TOKENIZER.read_bytes())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    TOKENIZER.write_text(json.dumps(content), encoding="utf-8")


def drop_merges() -> None:
    content = json.loads(TOKENIZER.read_bytes())
    content["model"]["merges"] = content["model"]["merges"][:1]
    TOKENIZER.write_text(json.dumps(content), encoding="utf-8")


def add_a_token() -> None:
    backend = Tokenizer.from_file(str(TOKENIZER))
    backend.add_tokens(["green"])
    backend.save(str(TOKENIZER))


def split_digits() -> None:
    backend = Tokenizer.from_file(str(TOKENIZER))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Split("e", "isolated"), backend.pre_tokenizer]
    )
    backend.save(str(TOKENIZER))


def edit_a_row() -> None:
    path = Path("data/train.jsonl")
    path.write_text(path.read_text(encoding="utf-8").replace("green", "blue"), encoding="utf-8")


def change_a_tensor() -> None:
    tensors = load_file("base/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1
    save_file(tensors, "base/model.safetensors", {"format": "pt"})


def ids(*tokens: str) -> list[int]:
    vocabulary = json.loads(TOKENIZER.read_bytes())["model"]["vocab"]
    return [vocabulary[token] for token in tokens]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (swap_tokens, "the token 'a' had the id {0} and has {1}, and 1 more differ"),
        (drop_merges, "model in tokenizer.json differs"),
        (add_a_token, "the token 'green' is new"),
        (split_digits, "pre_tokenizer in tokenizer.json differs"),
    ],
)
def test_what_gives_other_tokens_is_named(stopped, capsys, change, cause):
    cause = cause.format(*ids("a", "e"))
    change()
    each = [f"the tokens of {name}.jsonl have changed ({cause})" for name in ("train", "val")]
    assert refusal(capsys) == ", ".join(each)


def test_rows_and_tensors_that_differ_are_named(stopped, capsys):
    edit_a_row()
    change_a_tensor()
    base = "the base's weights have changed (model.layers.1.mlp.up_proj.weight differs)"
    assert refusal(capsys) == f"{base}, the rows of train.jsonl have changed"


def test_an_adapter_meets_its_base_in_other_files(stopped, capsys):
    command = ["generate", "out/step-000002", "--base_dir", "base", "--prompt", "x", "--max_new_tokens", "1"]
    store_in_two_files()
    assert main(command) == 0


def test_a_dry_run_and_check_data_write_nothing(stopped):
    shutil.rmtree("data/tokenized")
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    assert run("--out_dir", "other", "--dry_run", "true") == 0
    assert run(*THREE, "--dry_run", "true") == 0
    assert main(["check_data", "base", "--data_dir", "data", "--show", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
