"""README: its size, and the quickstart in a copy of the repository. test_docs runs its commands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.markdown import blocks, shape

from litlora.models.families import FAMILIES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_short():
    assert len(README.splitlines()) <= 250
    assert len(README.split()) <= 2200


def test_readme_lists_every_family_and_recipe():
    section = README.partition("## Models\n")[2].partition("\n## ")[0]
    table = "".join(line for line in section.splitlines(keepends=True) if line.startswith("| "))
    assert set(re.findall(r"`(\w+)`", table)) >= set(FAMILIES)
    recipes = list((ROOT / "config_hub/finetune_lora").glob("*/lora.yaml"))
    assert f"recipe for {len(recipes)} models" in section.replace("\n", " ")


@pytest.mark.slow
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
    before, after = (float(share) for share in re.findall(r"^exact_match +([\d.]+)", done.stdout, re.MULTILINE))
    assert before <= 0.05
    assert after >= 0.9
    shown = next(block for block in blocks(ROOT / "README.md") if block.text.startswith("== Before"))
    printed = {shape(line) for line in (done.stdout + done.stderr).splitlines()}
    missing = {line for line in shown.text.splitlines() if shape(line) not in printed and "answered:" not in line}
    assert not missing, f"scripts/quickstart does not print {missing}"
