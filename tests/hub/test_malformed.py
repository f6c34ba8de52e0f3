"""What a server may send that is no Hub, or a hostile one: one sentence, and nothing outside the folder."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.hub_server import Fault, HubServer, reachable_hub
from huggingface_hub import constants

from litlora.__main__ import main
from litlora.errors import LitLoraError
from litlora.hub import client
from litlora.hub.client import Repo
from litlora.hub.download import fetch_checkpoint

FILES = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights"}
LISTING = "/revision/main"  # where the list of a repository's files is


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with reachable_hub(monkeypatch, tmp_path) as server:
        monkeypatch.setattr(client, "WAITS", ())
        server.add("org/name", FILES)
        yield server


def refusal(tmp_path: Path) -> str:
    with pytest.raises(LitLoraError) as refused:
        fetch_checkpoint(Repo("org/name", "model", "main", None), tmp_path / "root", tokenizer_only=False)
    assert not list((tmp_path / "root").rglob("*"))
    return str(refused.value)


def listing(**keys: Any) -> bytes:
    entry = {"rfilename": "config.json", "size": 2, "blobId": "0"}
    return json.dumps({"id": "org/name", "sha": "abc", "siblings": [entry | keys.pop("file", {})]} | keys).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"null",
        b"{}",
        b"5",
        b'{"id": "org/name", "sha": "abc", "siblings": 5}',
        b'{"id": "org/name", "sha": "abc", "siblings": [5]}',
        b'{"id": "org/name", "sha": "abc", "siblings": [{}]}',
        listing(file={"size": "2"}),
        listing(file={"rfilename": 5}),
        listing(file={"lfs": 5}),
        listing(sha="\x1b[31mabc"),
        listing(sha="../.."),
    ],
)
def test_malformed_listing_is_one_sentence(hub, tmp_path, body):
    hub.fail(Fault(LISTING, body=body))
    assert "lists the files of model org/name as no Hub does: check HF_ENDPOINT" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["a\0b", "\ud800", "\x1b]0;x\x07\n", "../x", "a/b", ".hidden", "x" * 300, "\u202egpj"], ids=ascii
)
def test_shard_with_a_strange_name_is_refused_and_not_printed_raw(hub, tmp_path, name, capsys):
    name += ".safetensors"
    index = json.dumps({"weight_map": {"x": name}}).encode()
    hub.add("org/name", {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors.index.json": index})
    hub.repositories["org/name"].revisions["main"][name] = hub.repositories["org/name"].revisions["main"]["config.json"]
    assert main(["download", "org/name", "--checkpoint_root", str(tmp_path / "root")]) == 1
    sentence = capsys.readouterr().err.removesuffix("\n")
    assert "which is not one of its safetensors files" in sentence
    assert sentence.isprintable()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_body_longer_than_listed_ends_at_its_listed_size(hub, tmp_path, name, monkeypatch):
    hub.fail(Fault(name, body=b"x" * 50_000_000, times=9))
    sizes = []
    monkeypatch.setattr(Path, "unlink", lambda path, **_: sizes.append(path.stat().st_size))
    with pytest.raises(LitLoraError, match=f"^{name} of model org/name does not have the size and hash that the Hub "):
        fetch_checkpoint(Repo("org/name", "model", "main", None), tmp_path / "root", tokenizer_only=False)
    assert max(sizes) <= len(FILES[name])


def test_password_of_the_endpoint_is_not_printed(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://user:s3cret@127.0.0.1:9")
    sentence = refusal(tmp_path)
    assert "s3cret" not in sentence
    assert "http://...@127.0.0.1:9" in sentence


@pytest.mark.parametrize("packed", [False, True], ids=["long", "compressed"])
def test_listing_without_end_is_one_sentence(hub, tmp_path, packed, monkeypatch):
    monkeypatch.setattr(client, "MOST_LISTED", 1_000_000)
    body = b" " * 30_000_000 + listing()
    headers = {"Content-Encoding": "gzip"} if packed else {}
    hub.fail(Fault(LISTING, status=200, headers=headers, body=gzip.compress(body) if packed else body))
    assert "the list of its files does not end within 1 MB or 120 seconds" in refusal(tmp_path)


def test_slow_listing_is_one_sentence(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "LONGEST_LISTING", -1.0)
    assert "the list of its files does not end within " in refusal(tmp_path)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WINDOW", 0.3)


@pytest.mark.parametrize("path", [LISTING, "config.json", "model.safetensors"])
def test_trickling_body_is_one_sentence(hub, tmp_path, impatient, path):
    hub.add("org/name", FILES | {path: b"x" * 100_000} if path != LISTING else FILES)
    hub.fail(Fault(path, trickle=0.1, times=9))
    if path == LISTING:
        hub.faults[0].body = listing() + b" " * 100_000
    with pytest.raises(LitLoraError, match=r"\(only .* bytes have arrived in 0 seconds\): check the connection"):
        fetch_checkpoint(Repo("org/name", "model", "main", None), tmp_path / "root", tokenizer_only=False)
    assert len(hub.requests) < 9


def test_slow_body_that_arrives_in_time_is_complete(hub, tmp_path, impatient, monkeypatch):
    monkeypatch.setattr(client, "LEAST_BYTES", 100)
    hub.add("org/name", FILES | {"model.safetensors": b"x" * 2000})
    hub.fail(Fault("model.safetensors", trickle=0.05))
    fetch_checkpoint(Repo("org/name", "model", "main", None), tmp_path / "root", tokenizer_only=False)
    assert (tmp_path / "root/org/name/model.safetensors").read_bytes() == b"x" * 2000


def prepare(tmp_path: Path) -> int:
    return main(["prepare_json", "--source", "org/data", "--destination_path", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"null",
        b'{"id": "org/data", "sha": "abc", "siblings": [5]}',
        listing(file={"size": -1}),
        listing(file={"size": 10**30}),
        listing(file={"size": "x"}),
        listing(file={"rfilename": 5}),
        listing(sha="../.."),
        listing(cardData=5),
        listing(cardData={"configs": [{"config_name": "a", "data_dir": 5, "data_files": "x"}]}),
    ],
)
def test_malformed_listing_of_a_data_set_is_one_sentence(hub, tmp_path, body, capsys):
    hub.add("datasets/org/data", {"train.jsonl": b"{}"})
    hub.fail(Fault(LISTING, body=body))
    assert prepare(tmp_path) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "lists the files of dataset org/data as no Hub does: check HF_ENDPOINT" in lines[-1]


@pytest.mark.parametrize(
    "name", ["../../train.jsonl", "/train.jsonl", "a//train.jsonl", "a\nb/train.jsonl", "..\\train.jsonl"]
)
def test_file_of_a_data_set_with_a_strange_path_is_left_alone(hub, tmp_path, name, capsys):
    hub.add("datasets/org/data", {name: b'{"instruction": "a", "output": "b"}'})
    assert prepare(tmp_path) == 1
    assert "has no split train in a format that litlora reads (its files: none)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_file_of_a_data_set_that_is_longer_than_listed_ends(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("litlora.hub.datasets.SPARE", 100_000)
    hub.add("datasets/org/data", {"train.jsonl": b'{"instruction": "a", "output": "b"}\n'})
    hub.fail(Fault("train.jsonl", body=b"x" * 50_000_000, times=9))
    assert prepare(tmp_path) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("litlora: ")
    assert max(path.stat().st_size for path in (tmp_path / "hf_home").rglob("*")) <= 200_000


def test_trickling_file_of_a_data_set_is_one_sentence(hub, tmp_path, impatient, capsys):
    hub.add("datasets/org/data", {"train.jsonl": b'{"instruction": "a", "output": "b"}\n' * 1000})
    hub.fail(Fault("train.jsonl", trickle=0.1, times=9))
    assert prepare(tmp_path) == 1
    assert " bytes have arrived in 0 seconds): check the connection" in capsys.readouterr().err.splitlines()[-1]
