"""Symbolic links where litlora expects entries of its own: what they lead to is neither moved, removed nor copied."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub_server import HubServer, reachable_hub

from litlora.__main__ import main
from litlora.errors import LitLoraError
from litlora.hub.client import Repo
from litlora.hub.download import fetch_checkpoint
from litlora.utils.files import PENDING, atomic_directory, complete_transaction, write_atomically, write_transaction
from litlora.utils.locks import LOCK, locked

OWN = "is a symbolic link, where litlora expects an entry of its own: remove it"


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """Return a folder with a file, which must be as it was in the end."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "train.jsonl").write_text("mine")
    yield folder
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"train.jsonl": "mine"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    return folder


def test_pending_files_behind_a_link_are_not_moved(folder, victim):
    (folder / PENDING).symlink_to(victim)
    with pytest.raises(LitLoraError, match=OWN):
        complete_transaction(folder)
    with pytest.raises(LitLoraError, match=OWN):
        write_transaction(folder, {"train.jsonl": b"x"})


def test_leftovers_behind_a_link_are_not_removed(folder, victim):
    (folder / ".final.0a1b2c3d.partial").symlink_to(victim)
    with atomic_directory(folder / "final") as staging:
        assert staging.stat().st_mode & 0o777 == 0o700
        (staging / "a").write_text("a")
    assert (folder / "final/a").read_text() == "a"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_finished_folder_follows_the_umask(folder, umask):
    before = os.umask(umask)
    try:
        with atomic_directory(folder / "final"):
            pass
    finally:
        os.umask(before)
    assert (folder / "final").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_folder_behind_a_link_is_not_replaced(folder, victim):
    (folder / "final").symlink_to(victim)
    with pytest.raises(LitLoraError, match=OWN), atomic_directory(folder / "final"):
        pass
    assert os.listdir(folder) == ["final"]  # noqa: PTH208


def test_a_file_behind_a_link_is_replaced_and_not_written(folder, victim):
    (folder / "a").symlink_to(victim / "train.jsonl")
    write_atomically({folder / "a": b"new"})
    assert not (folder / "a").is_symlink()
    assert (folder / "a").read_bytes() == b"new"


def test_a_lock_behind_a_link_is_not_taken(folder, victim):
    (folder / LOCK).symlink_to(victim / "created")
    with pytest.raises(LitLoraError, match=r"--out_dir .* cannot be locked"), locked(folder, "--out_dir"):
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with reachable_hub(monkeypatch, tmp_path) as server:
        server.add("org/name", {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights"})
        yield server


def test_a_download_behind_a_link_is_refused(hub, tmp_path, victim):
    (tmp_path / "root/org/name").mkdir(parents=True)
    (tmp_path / "root/org/name/.download").symlink_to(victim)
    with pytest.raises(LitLoraError, match=OWN):
        fetch_checkpoint(Repo("org/name", "model", "main", None), tmp_path / "root", tokenizer_only=False)


def test_a_partial_file_behind_a_link_is_not_written(hub, tmp_path, victim, monkeypatch):
    staging = tmp_path / "root/org/name/.download"
    staging.mkdir(parents=True)
    monkeypatch.setattr("litlora.hub.download.Snapshot._content_name", lambda self, name: "known")
    (staging / "known").symlink_to(victim / "train.jsonl")
    with pytest.raises(LitLoraError, match="symbolic links"):
        fetch_checkpoint(Repo("org/name", "model", "main", None), tmp_path / "root", tokenizer_only=False)


@pytest.fixture
def run(adapter: Path, folder: Path) -> list[str]:
    """Return the command that made the run whose copy is `folder`/run."""
    shutil.copytree(adapter.parent, folder / "run")
    settings = folder / "run/hyperparameters.yaml"
    return ["finetune_lora", "--config", str(settings), "--out_dir", str(folder / "run")]


@pytest.mark.parametrize("name", ["final", "step-000001"])
def test_an_output_folder_with_a_link_is_refused_before_anything_is_removed(name, run, folder, victim, capsys):
    shutil.rmtree(folder / "run/final")
    (folder / "run" / name).symlink_to(victim)
    before = sorted(folder.rglob("*"))
    assert main([*run, "--overwrite", "true"]) == 1
    assert OWN in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer_config.json"])
def test_a_file_from_elsewhere_is_not_published(name, tiny, adapter, data_dir, folder, victim, capsys):
    base = Path(shutil.copytree(tiny, folder / "base"))
    settings = (base / name).read_bytes() if (base / name).exists() else b"secret"
    (folder / "secret").write_bytes(settings)
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(folder / "secret")
    merge = ["merge_lora", str(adapter), "--base_dir", str(base), "--out_dir", str(folder / "merged")]
    train = ["finetune_lora", str(base), "--data_dir", str(data_dir), "--out_dir", str(folder / "out"), "--dry_run"]
    for command in [merge, *([train] if name in ("tokenizer_config.json",) else [])]:
        assert main(command) == 1
        assert "is a link out of its folder, to " in capsys.readouterr().err
    assert not (folder / "merged").exists()
    assert not (folder / "out").exists()


def test_a_hub_cache_may_have_links_to_its_blobs(tiny, adapter, folder):
    blobs, snapshot = folder / "blobs", folder / "snapshots/0a1b"
    shutil.copytree(tiny, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert main(["merge_lora", str(adapter), "--base_dir", str(snapshot), "--out_dir", str(folder / "merged")]) == 0
    assert json.loads((folder / "merged/config.json").read_text())
    assert not [path for path in (folder / "merged").iterdir() if path.is_symlink()]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("command", ["merge_lora", "export"])
def test_weights_from_elsewhere_are_not_published(command, name, tiny, adapter, folder, capsys, monkeypatch):
    base = Path(shutil.copytree(tiny, folder / "base"))
    elsewhere = Path(shutil.copytree(tiny, folder / "elsewhere"))
    (base / name).unlink()
    (base / name).symlink_to(elsewhere / name)
    run = [command, str(adapter), "--base_dir", str(base), "--out_dir", str(folder / "made")]
    assert main(run) == 1
    assert "is a link out of its folder, to " in capsys.readouterr().err
    assert not (folder / "made").exists()
    monkeypatch.setenv("LITLORA_LINK_FOLDERS", f"/nowhere:{elsewhere}")
    assert main(run) == 0


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "prompt_style.yaml"])
def test_adapter_from_elsewhere_is_not_merged(name, tiny, adapter, folder, capsys):
    own = Path(shutil.copytree(adapter, folder / "adapter"))
    (own / name).unlink()
    (own / name).symlink_to(adapter / name)
    run = ["merge_lora", str(own), "--base_dir", str(tiny), "--out_dir", str(folder / "merged")]
    assert main(run) == 1
    assert "is a link out of its folder, to " in capsys.readouterr().err


def test_token_cache_behind_a_link_is_not_pruned(tiny, data_dir, folder, tmp_path, capsys):
    data = Path(shutil.copytree(data_dir, folder / "data", ignore=shutil.ignore_patterns("tokenized")))
    runs = tmp_path / "runs"
    for n in range(9):
        (runs / f"train-{n}").mkdir(parents=True)
    (data / "tokenized").symlink_to(runs)
    assert (
        main(["finetune_lora", str(tiny), "--data_dir", str(data), "--out_dir", str(folder / "out"), "--dry_run"]) == 1
    )
    assert OWN in capsys.readouterr().err
    assert len(list(runs.iterdir())) == 9


@pytest.mark.parametrize("command", ["finetune_lora", "check_data", "evaluate"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_split_that_is_no_file_is_one_sentence(tiny, data_dir, folder, capsys, command, make):
    data = Path(shutil.copytree(data_dir, folder / "data"))
    for name in ("train.jsonl", "val.jsonl"):
        (data / name).unlink()
        make(data / name)
    out = ["--out_dir", str(folder / "out"), "--dry_run"] if command == "finetune_lora" else []
    assert main([command, str(tiny), "--data_dir", str(data), *out]) == 1
    assert "is not a file but a device or a pipe: remove it" in capsys.readouterr().err


def test_adapter_that_is_a_pipe_or_a_loop_is_one_sentence(tiny, adapter, folder, capsys):
    own = Path(shutil.copytree(adapter, folder / "adapter"))
    weights = own / "adapter_model.safetensors"
    run = ["merge_lora", str(own), "--base_dir", str(tiny), "--out_dir", str(folder / "merged")]
    weights.unlink()
    os.mkfifo(weights)
    assert main(run) == 1
    assert "is not a file but a device or a pipe" in capsys.readouterr().err
    weights.unlink()
    weights.symlink_to(weights)
    assert main(run) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("litlora: ")
