"""Uploads to a local Hub: what is committed, what is refused, and each error of the Hub in one sentence."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.copies import edit_json
from helpers.hub_server import Fault, HubServer, reachable_hub
from huggingface_hub import constants

from litlora.__main__ import main
from litlora.hub import client

# huggingface_hub's own, where it sends a file
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload raw bytes/text content.:DeprecationWarning"
)
TOKEN = "hf_" + "x" * 30
BASE = ["--base_repo_id", "org/base"]


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[HubServer]:
    """Run a Hub to which the token of the environment may write, in the namespace `me`."""
    with reachable_hub(monkeypatch, tmp_path) as hub:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose protocol the Hub here does not speak
        monkeypatch.setattr(client, "WAITS", (0.0,))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub.grant(TOKEN)
        hub.writers[TOKEN] = "me"
        yield hub


@pytest.fixture
def copied(adapter, tmp_path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "final"))


def upload(folder: Path, *flags: str, repo_id: str = "me/tuned") -> int:
    return main(["upload", str(folder), "--repo_id", repo_id, *flags])


def committed(hub: HubServer, repo_id: str = "me/tuned", revision: str = "main") -> dict[str, bytes]:
    return {name: entry.content for name, entry in hub.repositories[repo_id].revisions[revision].items()}


def test_an_adapter_is_uploaded_without_paths_and_rows(hub, adapter, tiny, data_dir, capsys):
    assert upload(adapter, *BASE, "--private", "true") == 0
    assert capsys.readouterr().out == f"{hub.url}/me/tuned/tree/main\n"
    assert hub.repositories["me/tuned"].private
    files = committed(hub)
    assert files.keys() == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "prompt_style.yaml", "receipt.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert b'"me/tuned"' in files["README.md"]
    everything = b"".join(files.values())
    rows = [json.loads(line) for line in (data_dir / "val.jsonl").read_text(encoding="utf-8").splitlines()]
    local = [str(path.parent) for path in (tiny, data_dir, adapter)] + [
        row["output"] for row in rows if len(row["output"]) > 20
    ]
    assert not [text for text in local if json.dumps(text)[1:-1].encode() in everything]


def test_an_upload_is_repeated_and_goes_to_a_branch(hub, adapter):
    assert upload(adapter, *BASE) == 0
    assert upload(adapter, *BASE) == 0
    assert upload(adapter, *BASE, "--revision", "v2") == 0
    assert committed(hub, revision="v2") == committed(hub)
    assert not hub.repositories["me/tuned"].private


def test_a_model_of_gguf_or_safetensors_gets_a_card(hub, adapter, tiny, tmp_path):
    assert main(["export", str(adapter), "--out_dir", str(tmp_path / "gguf"), "--outtype", "f32"]) == 0
    assert upload(tmp_path / "gguf", repo_id="me/gguf") == 0
    assert committed(hub, "me/gguf").keys() == {"model.gguf", "Modelfile", "README.md", "receipt.json"}
    assert upload(tiny, *BASE, "--verify", "false", repo_id="me/base") == 0
    assert b"base_model: org/base" in committed(hub, "me/base")["README.md"]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("README.md", f"use {TOKEN}", "README.md holds what looks like an access token"),
        ("README.md", "trained in /home/me/project", "README.md holds a path of this machine (/home/me/project)"),
        ("prompt_style.yaml", "prompt_style: alpaca # C:\\Users\\me", "holds a path of this machine (C:\\Users\\me)"),
        ("tokenizer_config.json", '{"eos_token": "</s>", "x": "~/secret"}', "holds a path of this machine (~/secret)"),
    ],
)
def test_secrets_and_paths_are_refused_before_a_request(hub, copied, capsys, name, text, sentence):
    (copied / name).write_text(text, encoding="utf-8")
    assert upload(copied, *BASE) == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not hub.requests


def test_only_verified_copies_of_a_known_base_are_uploaded(hub, copied, capsys):
    assert upload(copied) == 1
    assert "name its repository on the Hub with --base_repo_id" in capsys.readouterr().err
    edit_json(copied / "adapter_config.json", lora_alpha=99)
    assert upload(copied, *BASE) == 1
    assert "is not the network that was trained" in capsys.readouterr().err
    (copied / "receipt.json").unlink()
    assert upload(copied, *BASE) == 1
    assert "has no receipt.json, by which it would be verified: pass --verify false" in capsys.readouterr().err
    assert upload(copied.parent, "--verify", "false") == 1
    assert "has no weights to upload" in capsys.readouterr().err
    assert not hub.requests


def test_a_repository_of_something_else_is_left_alone(hub, adapter, capsys):
    hub.add("me/other", {"model.safetensors": b"", "README.md": b""})
    assert upload(adapter, *BASE, repo_id="me/other") == 1
    assert "has model.safetensors, which is of another model: delete it there" in capsys.readouterr().err
    hub.add("me/public", {"README.md": b""})
    assert upload(adapter, *BASE, "--private", "true", repo_id="me/public") == 1
    assert "is there already and public" in capsys.readouterr().err
    assert committed(hub, "me/public") == {"README.md": b""}


@pytest.mark.parametrize("status", [500, 401, 403])
def test_errors_of_the_hub_are_one_sentence(hub, adapter, capsys, status):
    hub.fail(Fault("/commit/main", times=9, status=status))
    assert upload(adapter, *BASE, "--verify", "false") == 1
    expected = {
        500: "returned 500",
        401: "rejects the access token: create a new one",
        403: "may not write to model me/tuned",
    }
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("litlora: ")]
    assert expected[status] in sentence


def test_access_is_refused_in_one_sentence(hub, adapter, capsys, monkeypatch):
    assert upload(adapter, *BASE, "--verify", "false", repo_id="you/tuned") == 1
    assert "the access token may not write to model you/tuned" in capsys.readouterr().err
    assert upload(adapter, *BASE, "--verify", "false", "--access_token", "hf_unknown") == 1
    assert "the Hub rejects the access token" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    assert upload(adapter, *BASE, "--verify", "false") == 1
    assert "needs an access token: pass --access_token, or set HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert upload(adapter, *BASE, "--verify", "false") == 1
    assert "could not be reached" in capsys.readouterr().err


def test_a_hub_that_does_not_answer_is_one_sentence(hub, adapter, capsys, monkeypatch):
    monkeypatch.setattr(client, "WINDOW", 0.3)
    hub.fail(Fault("/api/repos/create", stall_after=0, times=9))
    assert upload(adapter, *BASE) == 1
    assert f"could not be reached at {hub.url} (timed out)" in capsys.readouterr().err.splitlines()[-1]
