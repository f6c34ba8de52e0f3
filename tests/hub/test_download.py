import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from helpers.hub_server import Fault, HubServer, reachable_hub
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import settings

from litlora.__main__ import main
from litlora.errors import LitLoraError
from litlora.hub import client
from litlora.hub.client import REPO_ID, Repo
from litlora.hub.datasets import fetch_dataset
from litlora.hub.download import STAGING, fetch_checkpoint
from litlora.hub.origin import ORIGIN, origin

INDEX = "model.safetensors.index.json"
TEXTS = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "LICENSE": b"Apache-2.0", "generation_config.json": b"{}"}
SINGLE = {**TEXTS, "model.safetensors": b"weights" * 1000}
SHARDS = {"model-00001-of-00002.safetensors": b"1" * 5000, "model-00002-of-00002.safetensors": b"2" * 5000}
SHARDED = {
    **TEXTS,
    **SHARDS,
    INDEX: json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode(),
}
TOKEN = "hf_aBcDeFgHiJ"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with reachable_hub(monkeypatch, tmp_path) as server:
        monkeypatch.setattr(client, "WAITS", (0.0, 0.0, 0.0))
        yield server


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def fetch(root: Path, repo_id: str, revision: str = "main", token: str | None = None) -> list[str]:
    return fetch_checkpoint(Repo(repo_id, "model", revision, token), root, tokenizer_only=False).names


def refusal(root: Path, repo_id: str, revision: str = "main", token: str | None = None) -> str:
    with pytest.raises(LitLoraError) as refused:
        fetch(root, repo_id, revision, token)
    return str(refused.value)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of the Hub by path."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ORIGIN]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def left_behind(root: Path) -> list[Path]:
    return list(root.rglob("*")) if root.exists() else []


def test_only_files_that_litlora_reads_are_fetched(hub: HubServer, root: Path):
    surplus = ("consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin", "model.gguf", "run.py")
    hub.add("org/name", {**SINGLE, **dict.fromkeys(surplus, b"surplus")})
    assert set(fetch(root, "org/name")) == set(SINGLE)
    assert contents(root) == {f"org/name/{name}": content for name, content in SINGLE.items()}
    assert sorted(hub.fetched()) == sorted(SINGLE)


def test_shards_of_the_index_are_fetched(hub: HubServer, root: Path):
    hub.add("org/name", {**SHARDED, "model.safetensors": b"other", "model.fp16.safetensors": b"other"})
    fetch(root, "org/name")
    assert contents(root / "org/name") == SHARDED


def test_origin_is_recorded(hub: HubServer, root: Path):
    hub.add("org/name", SINGLE)
    fetch(root, "org/name")
    first = origin(root / "org/name")
    assert first is not None
    assert first.repo_id == "org/name"
    assert re.fullmatch("[0-9a-f]{40}", first.revision)
    (root / "org/name" / ORIGIN).unlink()
    fetch(root, "org/name")  # as after a download by an earlier version
    assert origin(root / "org/name") == first
    hub.add("org/name", {**SINGLE, "config.json": b"{ }"})
    fetch(root, "org/name")
    assert origin(root / "org/name").revision != first.revision


def test_tokenizer_only_needs_neither_weights_nor_config(hub: HubServer, root: Path):
    texts = {name: content for name, content in TEXTS.items() if name != "config.json"}
    hub.add("org/name", {**texts, "model.safetensors": b"weights"})
    fetch_checkpoint(Repo("org/name", "model", "main", None), root, tokenizer_only=True)
    assert contents(root / "org/name") == texts


@pytest.mark.parametrize("files", [SINGLE, SHARDED])
def test_second_run_fetches_nothing(hub: HubServer, root: Path, files: Mapping[str, bytes]):
    hub.add("org/name", files)
    fetch(root, "org/name")
    hub.fetched()
    assert fetch(root, "org/name") == []
    assert hub.requests == ["GET /api/models/org/name/revision/main"]


@pytest.mark.parametrize("name", ["tokenizer.json", "model-00002-of-00002.safetensors"])
@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing"])
def test_only_the_corrupt_file_is_fetched_again(hub: HubServer, root: Path, name: str, fault: str):
    hub.add("org/name", SHARDED)
    fetch(root, "org/name")
    hub.fetched()
    path = root / "org/name" / name
    corrupt = {"truncated": SHARDED[name][:-1], "flipped": b"?" + SHARDED[name][1:]}
    path.write_bytes(corrupt[fault]) if fault in corrupt else path.unlink()
    assert fetch(root, "org/name") == hub.fetched() == [name]
    assert contents(root / "org/name") == SHARDED


def test_revision_is_fetched(hub: HubServer, root: Path):
    hub.add("org/name", {**TEXTS, "pytorch_model.bin": b"pickle"})
    hub.add("org/name", SINGLE, revision="refs/pr/1")
    fetch(root, "org/name", "refs/pr/1")
    assert contents(root / "org/name") == SINGLE


def test_newer_commit_fetches_changed_files_only(hub: HubServer, root: Path):
    hub.add("org/name", SINGLE)
    fetch(root, "org/name")
    hub.add("org/name", {**SINGLE, "config.json": b"{ }"})
    assert fetch(root, "org/name") == ["config.json"]
    assert (root / "org/name/config.json").read_bytes() == b"{ }"


def test_folder_of_another_checkpoint_is_refused(hub: HubServer, root: Path):
    hub.add("org/name", SINGLE)
    hub.add("org/name", SHARDED, revision="sharded")
    fetch(root, "org/name")
    assert refusal(root, "org/name", "sharded") == (
        f"{root}/org/name contains model.safetensors, which is not part of model org/name at revision sharded: "
        "move the folder away, or choose another --checkpoint_root"
    )
    assert contents(root / "org/name") == SINGLE


def test_interrupted_transfer_is_resumed(hub: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add("org/name", SINGLE)
    hub.fail(Fault("model.safetensors", cut_after=3000))
    fetch(root, "org/name")
    assert hub.ranges == ["bytes=3000-"]
    assert hub.fetched().count("model.safetensors") == 2
    assert contents(root / "org/name") == SINGLE


def test_next_run_resumes_a_failed_transfer(hub: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add("org/name", SINGLE)
    hub.fail(Fault("model.safetensors", cut_after=3000))
    hub.fail(Fault("model.safetensors", status=403))
    refusal(root, "org/name")
    assert fetch(root, "org/name") == ["model.safetensors"]
    assert hub.ranges == ["bytes=3000-"] * 2
    assert contents(root / "org/name") == SINGLE


@pytest.mark.parametrize("content", [b"x" * 3000, b"x" * 9000], ids=["other bytes", "too many"])
def test_corrupt_partial_file_is_discarded(hub: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch, content: bytes):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add("org/name", SINGLE)
    hub.fail(Fault("model.safetensors", cut_after=3000))
    hub.fail(Fault("model.safetensors", status=403))
    refusal(root, "org/name")
    (partial,) = (root / "org/name/.download").iterdir()
    partial.write_bytes(content)
    assert "does not have the size and hash that the Hub lists" in refusal(root, "org/name")
    fetch(root, "org/name")
    assert contents(root / "org/name") == SINGLE


def test_file_with_a_wrong_hash_is_discarded(hub: HubServer, root: Path):
    hub.add("org/name", SINGLE)
    hub.fail(Fault("model.safetensors", body=b"Weights" * 1000))
    assert refusal(root, "org/name") == (
        "model.safetensors of model org/name does not have the size and hash that the Hub lists: "
        "run the same command again"
    )
    assert contents(root / "org/name") == TEXTS
    assert fetch(root, "org/name") == ["model.safetensors"]


KILLS = 8 if settings().max_examples <= 100 else 200


def test_download_that_is_killed_at_any_instant_is_finished_by_the_next(
    hub: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.add("org/name", SHARDED)
    hub.fail(Fault(".safetensors", trickle=0.003, times=10**6))  # 0.15 s for a shard
    instants = Random(0)
    for number in range(KILLS):
        command = ["download", "org/name", "--checkpoint_root", str(root)]
        kill_after(instants.uniform(0, 0.4), (signal.SIGKILL, signal.SIGTERM)[number % 2], command)
        found = contents(root / "org/name") if (root / "org/name").exists() else {}
        assert found.items() <= SHARDED.items() | {
            (name, content) for name, content in found.items() if name.startswith(STAGING)
        }
        if len(found) == len(SHARDED):
            shutil.rmtree(root)
    assert main(["download", "org/name", "--checkpoint_root", str(root)]) == 0
    assert contents(root / "org/name") == SHARDED
    assert not (root / "org/name" / STAGING).exists()


def kill_after(seconds: float, number: int, command: list[str]) -> None:
    """Run a command in a process of its own, and send it a signal."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            main(command)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, number)
    os.waitpid(child, 0)


def test_complete_files_survive_a_failed_transfer(hub: HubServer, root: Path):
    hub.add("org/name", SHARDED)
    hub.fail(Fault("model-00002-of-00002.safetensors", status=500, times=4))
    assert refusal(root, "org/name") == (
        f"{hub.url} returned 500 Internal Server Error for model org/name: run the same command again later"
    )
    assert not list((root / "org/name").glob(".*"))
    assert fetch(root, "org/name") == ["model-00002-of-00002.safetensors"]


def test_gated_repository_without_token_is_refused(hub: HubServer, root: Path):
    hub.add("org/name", SINGLE, gated=True)
    assert refusal(root, "org/name") == (
        f"model org/name is gated: accept its licence at {hub.url}/org/name, then pass --access_token or set HF_TOKEN"
    )
    assert not left_behind(root)


def test_token_without_access_to_a_gated_repository(hub: HubServer, root: Path):
    hub.add("org/name", SINGLE, gated=True)
    hub.grant(TOKEN)
    assert refusal(root, "org/name", token=TOKEN) == (
        "model org/name is gated, and the access token has no access to it: accept its licence at "
        f"{hub.url}/org/name as the token's owner, and let the token read gated repositories"
    )
    assert not left_behind(root)


@pytest.mark.parametrize("barrier", ["gated", "private"])
def test_token_is_sent_to_the_hub_only(hub: HubServer, root: Path, barrier: str):
    hub.add("org/name", SINGLE, **{barrier: True})
    hub.grant(TOKEN, "org/name")
    fetch(root, "org/name", token=TOKEN)  # the host of the weights refuses a token
    assert contents(root / "org/name") == SINGLE


def test_token_comes_from_the_environment(hub: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch):
    hub.add("org/name", SINGLE, gated=True)
    hub.grant(TOKEN, "org/name")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch(root, "org/name")
    assert contents(root / "org/name") == SINGLE


@pytest.mark.parametrize("given", [True, False])
def test_unknown_token_is_refused(hub: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch, given: bool):
    hub.add("org/name", SINGLE)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert refusal(root, "org/name", token=TOKEN if given else None) == (
        "the Hub rejects the access token: create a new one at https://huggingface.co/settings/tokens"
    )
    assert not left_behind(root)


@pytest.mark.parametrize("token", ["hf_\u00e4bc", "hf_a\nb", "hf_a\r", "hf a", " ", "\x7f"])
def test_malformed_token_is_refused(hub: HubServer, root: Path, token: str):
    assert refusal(root, "org/name", token=token) == (
        "the access token contains a space, a line break or a non-ASCII character: "
        "copy it again from https://huggingface.co/settings/tokens"
    )
    assert not hub.requests


@pytest.mark.parametrize("repo_id", ["foo", "a/b/c", "../x", "a/..", "./x", "a b/c", "a/b ", "", "/", "a/b--c", "/a/b"])
def test_malformed_repository_id_is_refused(hub: HubServer, root: Path, repo_id: str):
    assert refusal(root, repo_id) == f"{repo_id!r} is not a repository id of the Hub: write ORG/NAME"
    assert not hub.requests


@pytest.mark.parametrize("name", ["b", "b_", "_b", "b.c-d", "b" * 96, "b" * 97, "b-", ".b", "b.git", "b..c", "b--c"])
def test_repository_ids_follow_the_rules_of_the_hub(name: str):
    for repo_id in (f"a/{name}", f"{name}/a"):
        try:
            validate_repo_id(repo_id)
        except HFValidationError:
            assert not REPO_ID.fullmatch(repo_id)
        else:
            assert REPO_ID.fullmatch(repo_id)


@pytest.mark.parametrize("private", [False, True])
def test_missing_or_private_repository_is_refused(hub: HubServer, root: Path, private: bool):
    if private:
        hub.add("org/name", SINGLE, private=True)
    assert refusal(root, "org/name") == (
        "there is no model org/name on the Hub, or it is private: check the name, "
        "and for a private one pass --access_token or HF_TOKEN"
    )
    hub.grant(TOKEN)
    assert refusal(root, "org/name", token=TOKEN) == (
        "there is no model org/name on the Hub, or it is private: check the name, and that the access token may read it"
    )
    assert not left_behind(root)


def test_missing_revision_is_refused(hub: HubServer, root: Path):
    hub.add("org/name", SINGLE)
    assert refusal(root, "org/name", "v2") == (
        f"model org/name has no revision v2: see {hub.url}/org/name/tree/main for its branches and tags"
    )


@pytest.mark.parametrize(
    ("lacking", "sentence"),
    [
        ("config.json", "model org/name has no config.json, so it is not a checkpoint that litlora can read"),
        ("tokenizer.json", "model org/name has no tokenizer.json or tokenizer.model, and litlora needs one of them"),
        (
            "model.safetensors",
            "model org/name has neither model.safetensors nor model.safetensors.index.json, "
            "so it is not a checkpoint that litlora can read",
        ),
    ],
)
def test_repository_without_checkpoint_is_refused(hub: HubServer, root: Path, lacking: str, sentence: str):
    hub.add("org/name", {name: content for name, content in SINGLE.items() if name != lacking})
    assert refusal(root, "org/name") == sentence
    assert not hub.fetched()
    assert not left_behind(root)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth", "tf_model.h5"])
def test_pickled_weights_are_refused(hub: HubServer, root: Path, pickle: str):
    hub.add("org/name", {**TEXTS, pickle: b"pickle"})
    assert refusal(root, "org/name") == (
        f"model org/name has only pickled weights ({pickle}), and a pickle can run any code when it is read: "
        f"look at {hub.url}/org/name/discussions for a safetensors conversion and fetch it with "
        "--revision refs/pr/N, or choose another repository"
    )
    assert not hub.fetched()


@pytest.mark.parametrize(
    ("weight_map", "fault"),
    [
        ({"a": "pytorch_model.bin"}, "names pytorch_model.bin, which is not one of its safetensors files"),
        ({"a": "sub/x.safetensors"}, "names sub/x.safetensors, which is not one of its safetensors files"),
        ({"a": "../x.safetensors"}, "names ../x.safetensors, which is not one of its safetensors files"),
        (
            {"a": "model-00003-of-00003.safetensors"},
            "names model-00003-of-00003.safetensors, which is not one of its safetensors files",
        ),
        ({}, "names no files"),
        (["model-00001-of-00002.safetensors"], "names no files"),
    ],
)
def test_index_without_valid_shards_is_refused(hub: HubServer, root: Path, weight_map: object, fault: str):
    index = json.dumps({"weight_map": weight_map}).encode()
    hub.add("org/name", {**SHARDED, INDEX: index, "pytorch_model.bin": b"pickle", "sub/x.safetensors": b""})
    assert refusal(root, "org/name") == (
        f"model.safetensors.index.json of model org/name {fault}: the repository is broken, so choose another"
    )
    assert not left_behind(root)


def test_disk_space_is_checked_before_the_transfer(hub: HubServer, root: Path):
    hub.add("org/name", SINGLE, listed_sizes={"model.safetensors": 10**18})
    sentence = re.sub(r"has [\d.]+ [MGT]B", "has less", refusal(root, "org/name"))
    hint = "free some space, or choose another --checkpoint_root"
    assert sentence == f"the download needs 1.0 EB, but {root} has less: {hint}"
    assert not hub.fetched()
    assert not left_behind(root)


def test_unwritable_root_is_refused(hub: HubServer, tmp_path: Path):
    hub.add("org/name", SINGLE)
    root = tmp_path / "file"
    root.write_bytes(b"")
    assert refusal(root, "org/name") == (
        f"cannot write to {root} (Not a directory): fix that, or choose another folder with --checkpoint_root"
    )


def test_unreachable_hub_is_refused(hub: HubServer, root: Path):
    hub.shutdown()
    hub.server_close()
    assert refusal(root, "org/name") == (
        f"model org/name could not be fetched from {hub.url} ([Errno 111] Connection refused): "
        "check the connection, and run the same command again to resume"
    )


def test_offline_mode_is_refused(hub: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(root, "org/name") == ("model org/name cannot be fetched while HF_HUB_OFFLINE is set: unset it")


def test_web_server_that_is_not_a_hub_is_refused(hub: HubServer, root: Path):
    hub.fail(Fault("/revision/main", body=b"<html>Please log in to the WLAN</html>"))
    hub.add("org/name", SINGLE)
    assert refusal(root, "org/name") == f"the server at {hub.url} is not a Hub: check HF_ENDPOINT and the proxy"


@pytest.mark.parametrize(("status", "phrase"), [(403, "403 Forbidden"), (404, "404 Not Found")])
def test_refused_file_is_reported(hub: HubServer, root: Path, status: int, phrase: str):
    hub.add("org/name", SINGLE)
    hub.fail(Fault("tokenizer.json", status=status))
    assert refusal(root, "org/name") == (
        f"{hub.url} returned {phrase} for model org/name: run the same command again later"
    )


def test_web_page_instead_of_a_file_is_discarded(hub: HubServer, root: Path):
    hub.add("org/name", SINGLE)
    hub.fail(Fault("config.json", body=b"<html>Please log in to the WLAN</html>"))
    assert refusal(root, "org/name") == (
        "config.json of model org/name does not have the size and hash that the Hub lists: run the same command again"
    )
    assert not left_behind(root)


def test_overloaded_hub_is_refused(hub: HubServer, root: Path):
    hub.fail(Fault("/revision/main", status=503, times=4))
    assert refusal(root, "org/name") == (
        f"{hub.url} returned 503 Service Unavailable for model org/name: run the same command again later"
    )


@pytest.mark.parametrize("path", ["/revision/main", "config.json", "model.safetensors"])
@pytest.mark.parametrize(("status", "headers"), [(500, {}), (503, {}), (429, {"Retry-After": "0"})])
def test_request_is_retried(
    hub: HubServer, root: Path, path: str, status: int, headers: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add("org/name", SINGLE)
    hub.fail(Fault(path, status=status, headers=headers))
    fetch(root, "org/name")
    assert contents(root / "org/name") == SINGLE


def test_retry_after_is_respected(hub: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.add("org/name", SINGLE)
    hub.fail(Fault("/revision/main", status=429, headers={"Retry-After": "17"}))
    fetch(root, "org/name")
    assert waits == [17]


def test_all_files_are_of_one_commit(hub: HubServer, root: Path):
    hub.add("org/name", SINGLE)
    hub.add("org/name", SINGLE, revision="as it was")
    newer = {name: content + b" " for name, content in SINGLE.items()}
    hub.when("config.json", lambda: hub.add("org/name", newer))
    fetch(root, "org/name")
    assert contents(root / "org/name") == SINGLE


def test_path_outside_the_folder_is_ignored(hub: HubServer, root: Path, tmp_path: Path):
    names = ("../../evil", "../tokenizer.model", "/etc/evil", "..", "sub/../../config.json")
    hub.add("org/name", {**SINGLE, **dict.fromkeys(names, b"evil")})
    fetch(root, "org/name")
    assert contents(root) == {f"org/name/{name}": content for name, content in SINGLE.items()}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]


def test_repository_with_xet_storage_is_fetched_over_http(hub: HubServer, root: Path):
    hub.add("org/name", SINGLE)
    hub.has_xet = True  # whose server does not exist
    fetch(root, "org/name")
    assert contents(root / "org/name") == SINGLE


def test_concurrent_downloads_wait_for_each_other(hub: HubServer, root: Path, capsys: pytest.CaptureFixture[str]):
    hub.add("org/name", SHARDED)
    with ThreadPoolExecutor(4) as pool:
        fetched = list(pool.map(lambda _: fetch(root, "org/name"), range(4)))
    assert sorted(map(len, fetched)) == [0, 0, 0, len(SHARDED)]
    assert contents(root / "org/name") == SHARDED
    assert sorted(hub.fetched()) == sorted(SHARDED)


def fetch_dataset_of(repo_id: str, token: str | None) -> dict[str, Path]:
    return fetch_dataset(repo_id, "train", None, [".jsonl"], token)


def test_dataset_file_is_fetched_once(hub: HubServer):
    hub.add("datasets/org/name", {"train.jsonl": b"{}\n"}, gated=True)
    hub.grant(TOKEN, "datasets/org/name")
    paths = fetch_dataset_of("org/name", TOKEN)
    assert paths["train.jsonl"].read_bytes() == b"{}\n"
    assert hub.fetched() == ["train.jsonl"]
    assert fetch_dataset_of("org/name", TOKEN) == paths
    assert hub.fetched() == []


def test_refused_dataset_names_its_own_page(hub: HubServer):
    hub.add("datasets/org/name", {"train.jsonl": b"{}\n"}, gated=True)
    with pytest.raises(LitLoraError) as refused:
        fetch_dataset_of("org/name", None)
    assert str(refused.value) == (
        f"dataset org/name is gated: accept its licence at {hub.url}/datasets/org/name, "
        "then pass --access_token or set HF_TOKEN"
    )
