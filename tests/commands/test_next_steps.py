import shlex
from pathlib import Path

import pytest

from litlora.args import COMMANDS
from litlora.cli.parser import Call, parse
from litlora.commands.next_steps import next_steps

ROOT = Path(__file__).parents[2]
PROMPT = "--prompt 'Name three primary colors.'"
NEXT = {
    "download org/name": [
        "litlora prepare_alpaca",
        "litlora finetune_lora checkpoints/org/name --data_dir data/alpaca",
    ],
    "download org/name --tokenizer_only": [],
    "prepare_alpaca": ["litlora finetune_lora CHECKPOINT --data_dir data/alpaca"],
    "prepare_json --source a.csv --destination_path=data/a": ["litlora finetune_lora CHECKPOINT --data_dir data/a"],
    "finetune_lora base --data_dir data --out_dir out": [
        f"litlora generate out/final {PROMPT}",
        "litlora merge_lora out/final --out_dir out/merged",
    ],
    "finetune_lora base --data_dir data --dry_run": [],
    "generate base --prompt x": [],
    "merge_lora final --out_dir merged": [f"litlora generate merged {PROMPT}"],
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("final").mkdir()
    Path("final/prompt_style.yaml").write_text("prompt_style: alpaca\n")


@pytest.mark.parametrize("command", NEXT)
def test_next_commands_have_real_paths_and_parse(command):
    call = parse(command.split())
    assert isinstance(call, Call)
    lines = next_steps(call.args)
    assert lines == NEXT[command]


def test_examples_of_help_parse(monkeypatch):
    monkeypatch.chdir(ROOT)  # one names a file of config_hub
    for name, kind in COMMANDS.items():
        for example in kind.examples:
            call = parse(shlex.split(example)[1:])
            assert isinstance(call, Call)
            assert call.command == name
