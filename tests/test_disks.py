"""Read-only and full disks: one sentence of each command, nothing half-written, and the next call works.

They are file systems in memory, which root alone may mount.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from helpers.hub_server import HubServer, reachable_hub
from huggingface_hub import constants

from litlora.__main__ import main

QUICK = ["--precision", "32-true", "--train.max_steps", "2", "--train.save_interval", "1", "--eval.max_new_tokens", "0"]
FINETUNE = ["finetune_lora", "base", "--data_dir", "data", "--out_dir", "out", *QUICK]
SWEEP = """
checkpoint_dir: base
data_dir: data
out_dir: out
seeds: [1]
base: {precision: 32-true, eval: {max_new_tokens: 0}, train: {max_steps: 1, global_batch_size: 5}}
search: {lora_r: [4]}
"""
COMMANDS = {
    "download": ["download", "org/name", "--checkpoint_root", "out"],
    "prepare_json": ["prepare_json", "--source", "data/train.jsonl", "--destination_path", "out"],
    "finetune_lora": FINETUNE,
    "merge_lora": ["merge_lora", "run/final", "--base_dir", "base", "--out_dir", "out"],
    "export": ["export", "base", "--outtype", "f32", "--out_dir", "out"],
    "gguf-lora": ["export", "run/final", "--base_dir", "base", "--format", "gguf-lora", "--out_dir", "out"],
    "report": ["report", "run", "--out_file", "out/report.html"],
    "report of a run": ["report", "run"],
    "evaluate": ["evaluate", "base", "--data_dir", "data", "--metrics", "loss", "--out_file", "out/evaluation.json"],
    "sweep": ["sweep", "--config", "sweep.yaml"],
}


def mount(*arguments: str) -> None:
    if subprocess.run(["mount", *arguments], capture_output=True).returncode:
        pytest.skip("mounting needs root")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with reachable_hub(monkeypatch, tmp_path) as server:
        server.add("org/name", {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": bytes(200_000)})
        yield server


@pytest.fixture
def disk(tmp_path, tiny, adapter, data_dir, monkeypatch) -> Iterator[Path]:
    """Return a small disk of its own, the working directory, on which all is well."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder))
    try:
        for name, source in {"base": tiny, "run": adapter.parent, "data": data_dir}.items():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("tokenized"))
        (folder / "sweep.yaml").write_text(SWEEP, encoding="utf-8")
        monkeypatch.chdir(folder)
        yield folder
    finally:
        os.chdir(tmp_path)
        subprocess.run(["umount", "--lazy", folder], check=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(command: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(command) == 1
    printed = capsys.readouterr().err
    (sentence,) = [line for line in printed.splitlines() if line.startswith("litlora: ")]
    assert "Traceback" not in printed
    return sentence


@pytest.mark.parametrize("name", COMMANDS)
def test_read_only_disk_is_one_sentence(disk, hub, capsys, name):
    mount("-o", "remount,ro", str(disk))
    assert "Read-only file system" in refusal(COMMANDS[name], capsys)


def fill(disk: Path, spare: int) -> None:
    """Leave `spare` bytes of a disk free."""
    filler = disk / "filler"
    with filler.open("wb") as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(65536))
            file.flush()
    os.truncate(filler, filler.stat().st_size - spare)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "sweep"])  # which takes as long as the others
def test_full_disk_is_one_sentence(disk, hub, capsys, name):
    fill(disk, 0)
    before = contents(disk)
    sentence = refusal(COMMANDS[name], capsys)
    assert "No space left on device" in sentence or "but out has 0 bytes: free some space" in sentence
    assert contents(disk) == before
    (disk / "filler").unlink()
    assert main(COMMANDS[name]) == 0


def test_disk_that_fills_during_a_download_keeps_what_has_arrived(disk, hub, capsys, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 8192)
    hub.when("model.safetensors", lambda: (disk / "filler").exists() or fill(disk, 65536))
    refused = "cannot write to out (No space left on device): fix that, or choose another folder with --checkpoint_root"
    assert refusal(COMMANDS["download"], capsys) == f"litlora: {refused}"
    hub.events.clear()
    (disk / "filler").unlink()
    assert main(COMMANDS["download"]) == 0
    assert [int(each[6:-1]) > 8192 for each in hub.ranges] == [True]
    assert (disk / "out/org/name/model.safetensors").read_bytes() == bytes(200_000)


@pytest.mark.parametrize("spare", [100_000, 300_000, 400_000])
def test_training_that_fills_a_disk_is_resumed(disk, capsys, spare):
    """It fills while the first checkpoint, the second one, and the final adapter are written."""
    fill(disk, spare)
    assert "No space left on device" in refusal(FINETUNE, capsys)
    assert not list(disk.rglob("*.partial"))
    (disk / "filler").unlink()
    mode = "--resume" if list(disk.glob("out/step-*")) else "--overwrite"
    assert main([*FINETUNE, mode, "true"]) == 0


def test_full_disk_of_temporary_files_is_one_sentence(tmp_path, disk, capsys, monkeypatch):
    """A dry run writes nothing beside the data, but its tokens into a temporary folder."""
    fill(disk, 0)
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    command = [*FINETUNE, "--out_dir", str(tmp_path / "out"), "--dry_run"]
    assert "No space left on device" in refusal(command, capsys)
