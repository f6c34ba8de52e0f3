import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.hub_server import Fault, HubServer, reachable_hub
from huggingface_hub import constants
from safetensors.torch import load_file, save

from litlora import __version__
from litlora.hub.origin import ORIGIN, origin

TOKEN = "hf_aBcDeFgHiJ"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with reachable_hub(monkeypatch, tmp_path) as server:
        yield server


@pytest.fixture
def checkpoint() -> dict[str, bytes]:
    """A checkpoint in two shards, beside weights that litlora does not read."""
    tensors = {name: torch.randn(16, 64) for name in SHARDS}
    return {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": json.dumps({"weight_map": {name: name for name in SHARDS}}).encode(),
        **{name: save({name: tensor}) for name, tensor in tensors.items()},
        "pytorch_model.bin": b"pickle",
    }


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "litlora", "download", "--repo_id", "org/name", *flags]


def run(folder: Path, *flags: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*flags), cwd=folder, capture_output=True, text=True, timeout=600, **options)


def test_checkpoint_is_downloaded_once(hub: HubServer, tmp_path: Path, checkpoint: dict[str, bytes]):
    hub.add("org/name", checkpoint)
    first = run(tmp_path)
    assert (first.returncode, first.stdout) == (0, "checkpoints/org/name\n"), first.stderr
    folder = tmp_path / "checkpoints/org/name"
    del checkpoint["pytorch_model.bin"]
    assert origin(folder).repo_id == "org/name"
    files = [path for path in folder.iterdir() if path.name != ORIGIN]
    assert {path.name: path.read_bytes() for path in files} == checkpoint
    assert load_file(folder / SHARDS[0])[SHARDS[0]].shape == (16, 64)
    assert sorted(hub.fetched()) == sorted(checkpoint)
    second = run(tmp_path)
    assert (second.returncode, second.stdout) == (0, "checkpoints/org/name\n")
    assert hub.fetched() == []


def test_killed_download_is_resumed(hub: HubServer, tmp_path: Path, checkpoint: dict[str, bytes]):
    chunk = constants.DOWNLOAD_CHUNK_SIZE
    checkpoint[SHARDS[1]] = os.urandom(chunk + 2000)
    hub.add("org/name", checkpoint)
    fault = hub.fail(Fault(SHARDS[1], stall_after=chunk + 1000))
    with subprocess.Popen(command(), cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        assert fault.stalled.wait(600)
        folder = tmp_path / "checkpoints/org/name"
        while not any(path.stat().st_size == chunk for path in folder.glob(".download/*")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert (folder / SHARDS[0]).read_bytes() == checkpoint[SHARDS[0]]
    assert not (folder / SHARDS[1]).exists()
    hub.fetched()
    assert run(tmp_path).returncode == 0
    assert hub.ranges == [f"bytes={chunk}-"]
    assert hub.fetched() == [SHARDS[1]]
    assert not (folder / ".download").exists()
    assert (folder / SHARDS[1]).read_bytes() == checkpoint[SHARDS[1]]


def test_interrupted_download_leaves_complete_files(hub: HubServer, tmp_path: Path, checkpoint: dict[str, bytes]):
    hub.add("org/name", checkpoint)
    fault = hub.fail(Fault(SHARDS[0], stall_after=1000))
    with subprocess.Popen(command(), cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert fault.stalled.wait(600)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=600)
    assert "Traceback" not in stderr
    root = tmp_path / "checkpoints"
    left = {path.name for path in root.rglob("*") if path.is_file()}
    assert left == {"config.json", "tokenizer.json", "model.safetensors.index.json"}


def test_tokenizer_only_fetches_no_weights(hub: HubServer, tmp_path: Path, checkpoint: dict[str, bytes]):
    hub.add("org/name", checkpoint)
    assert run(tmp_path, "--tokenizer_only", "true", "--checkpoint_root", "elsewhere").stdout == "elsewhere/org/name\n"
    assert hub.fetched() == ["config.json", "tokenizer.json"]


def test_error_is_one_sentence_without_the_token(hub: HubServer, tmp_path: Path, checkpoint: dict[str, bytes]):
    hub.add("org/name", checkpoint, gated=True)
    hub.grant(TOKEN)
    result = run(tmp_path, "--access_token", TOKEN)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"litlora {__version__}: download\n"
        "litlora: model org/name is gated, and the access token has no access to it: accept its licence at "
        f"{hub.url}/org/name as the token's owner, and let the token read gated repositories\n"
    )
    assert not list(tmp_path.glob("checkpoints/*"))


def test_full_disk_keeps_what_has_arrived(hub: HubServer, tmp_path: Path, checkpoint: dict[str, bytes]):
    hub.add("org/name", {**checkpoint, SHARDS[1]: os.urandom(50_000)})
    result = run(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "litlora: cannot write to checkpoints (File too large): "
        "fix that, or choose another folder with --checkpoint_root"
    )
    folder = tmp_path / "checkpoints/org/name"
    complete = {"config.json", "tokenizer.json", "model.safetensors.index.json", SHARDS[0]}
    assert {path.name for path in folder.iterdir()} == {*complete, ".download"}
    hub.fetched()
    assert run(tmp_path).returncode == 0
    assert (hub.fetched(), hub.ranges) == ([SHARDS[1]], ["bytes=20000-"])
    assert {path.name for path in folder.iterdir()} == {*complete, SHARDS[1], ORIGIN}
