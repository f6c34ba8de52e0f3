"""README's commands are run as they stand, its flags are the parser's, its tree is the repository's."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from benchmarks.__main__ import build_parser as build_benchmark_parser
from helpers.families import Family
from helpers.hub_server import reachable_hub
from torch.distributed.run import get_args_parser as get_torchrun_parser
from transformers import LlamaConfig

from litlora.__main__ import COMMANDS, build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "config_hub").rglob("*.yaml"))


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands() -> list[list[str]]:
    return [shlex.split(line) for block in blocks("bash") for line in block.splitlines() if line.startswith("litlora ")]


@pytest.fixture
def workplace(tmp_path, monkeypatch, make_checkpoint):
    """Return a folder as a user has it, where the Hub serves a small model under the name of README's."""
    small = make_checkpoint(Family("readme", LlamaConfig, {"max_position_embeddings": 1024}))
    (tmp_path / "config_hub").symlink_to(ROOT / "config_hub")
    shapes = "\n".join(block for block in blocks("json"))
    (tmp_path / "my_data.jsonl").write_text(shapes * 5, encoding="utf-8")
    rows = [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(n)))} for n in range(1, 60)
    ]
    (tmp_path / "archive.json").write_text(json.dumps(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with reachable_hub(monkeypatch, tmp_path / "hub") as hub:
        files = {path.name: path.read_bytes() for path in small.iterdir()}
        hub.add(next(word for line in commands() for word in line if word.startswith("HuggingFaceTB/")), files)
        yield tmp_path


def test_the_commands_of_readme_work_one_after_the_other(workplace):
    assert len(commands()) == 7
    for command in commands():
        if command[1:] == ["prepare_alpaca"]:
            command += ["--source", "archive.json"]  # instead of the archive on the internet
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    code = "\n".join(blocks("python"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_quickstart_teaches_pico_to_answer(tmp_path):
    folder = tmp_path / "clone"
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)  # installed already, so that the script need not reach for the internet
    done = subprocess.run([folder / "scripts/quickstart"], capture_output=True, text=True, env=os.environ | {"CI": "1"})
    assert done.returncode == 0, done.stderr
    before, after = (float(share) for share in re.findall(r"exact match: .* = ([\d.]+)%", done.stdout))
    assert before <= 5
    assert after >= 90


def test_every_flag_in_readme_is_one_of_a_parser():
    helps = (
        build_benchmark_parser().format_help()
        + get_torchrun_parser().format_help()
        + "".join(build_parser()._subcommands_action._name_parser_map[name].format_help() for name in COMMANDS)
    )
    known = set(re.findall(r"--[\w.]+", helps))
    mentioned = {flag.rstrip(".") for flag in re.findall(r"--[a-z][\w.]*", README)}
    assert {flag for flag in mentioned if not flag.startswith("--optimizer.")} <= known


def test_the_tree_in_readme_is_that_of_the_repository():
    names = ("litlora/*.py", "litlora/commands/*.py", "scripts/*", "scripts/benchmarks/*.py", "config_hub/*/*.yaml")
    files = {path for pattern in names for path in ROOT.glob(pattern) if path.is_file()}
    tree = next(block for block in blocks("") if block.startswith("litlora/"))
    folder, listed = Path(), set()
    for line in tree.splitlines():
        name, indent = line.split()[0], len(line) - len(line.lstrip())
        path = (Path(*folder.parts[: indent // 2]) if indent else Path()) / name
        if name.endswith("/"):
            folder = path
        else:
            listed.add(path)
    assert listed >= {path.relative_to(ROOT) for path in files if path.name != "__init__.py"}
    assert all((ROOT / path).exists() for path in listed)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_repeats_no_default(path):
    parser = build_parser()
    parsed = parser.parse_args([path.parent.name, "--config", str(path)])[path.parent.name]
    required = ["--checkpoint_dir", "x", "--data_dir", "x"]
    defaults = parser.parse_args([path.parent.name, *required])[path.parent.name]

    def leaves(node: dict, prefix: str = "") -> list[str]:
        return [
            leaf
            for key, value in node.items()
            for leaf in (leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"])
        ]

    for key in leaves(yaml.safe_load(path.read_text(encoding="utf-8"))):
        assert parsed[key] != defaults[key], f"{key} is the default"
