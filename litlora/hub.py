"""What is fetched from the Hugging Face Hub, and how its refusals read."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import httpx2
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from tqdm import tqdm

from litlora import __version__
from litlora.errors import LitLoraError
from litlora.files import read_json
from litlora.layout import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    LICENCES,
    PICKLES,
    TOKENIZER_FILES,
    TOKENIZERS,
    WEIGHTS,
)

SMALL_FILES = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES)
TERMS = ("README.md", *LICENCES)
REPO_ID = re.compile(r"(?!.*(?:--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)  # the Hub's rules
TOKEN_PAGE = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Repo:
    """A revision of a repository on the Hub, as it shows itself to the owner of a token."""

    id: str
    kind: Literal["model", "dataset"]
    revision: str
    token: str | None

    def __post_init__(self) -> None:
        if not REPO_ID.fullmatch(self.id):
            raise LitLoraError(f"{self.id!r} is no repository of the Hub: give its name as ORG/NAME")
        if self.effective_token and not re.fullmatch("[!-~]+", self.effective_token):
            fault = "holds a space, a line break or a letter beyond ASCII, which no token does"
            raise LitLoraError(f"the access token {fault}: copy it again from {TOKEN_PAGE}")

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"

    @property
    def effective_token(self) -> str | None:
        """The token, or else the environment's or the logged-in user's, which huggingface_hub then sends."""
        return self.token or get_token()

    @property
    def api(self) -> HfApi:
        """The Hub's client for this token."""
        return HfApi(token=self.token, library_name="litlora", library_version=__version__)

    @property
    def page(self) -> str:
        """The address of the repository for a person."""
        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.id}"


@dataclass(frozen=True)
class Snapshot:
    """One commit of a model's repository: the files at its top, by name."""

    repo: Repo
    commit: str
    files: Mapping[str, RepoSibling]

    @classmethod
    def of(cls, repo: Repo) -> "Snapshot":
        """Ask the Hub, once, so that everything that is fetched is of one commit."""
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = repo.api.model_info(repo.id, revision=repo.revision, files_metadata=True, timeout=timeout)
        files = {file.rfilename: file for file in info.siblings or () if "/" not in file.rfilename}
        return cls(repo, str(info.sha), files)

    def describes(self, path: Path) -> bool:
        """Say whether a file on the disk is the one that the Hub lists by its name, from its size and hash."""
        listed = self.files[path.name]
        if not path.is_file() or path.stat().st_size != listed.size:
            return False
        with path.open("rb") as file:
            if listed.lfs:
                return hashlib.file_digest(file, "sha256").hexdigest() == listed.lfs.sha256
            blob = hashlib.sha1(b"blob %d\0" % listed.size, usedforsecurity=False)  # as git names a file's content
            return hashlib.file_digest(file, lambda: blob).hexdigest() == listed.blob_id

    def fetch(self, name: str, folder: Path) -> Path:
        """Bring a file into `folder`, unless it is there, and make sure that it is what the Hub lists."""
        path = folder / name
        self.repo.api.hf_hub_download(self.repo.id, name, revision=self.commit, local_dir=folder)
        if not self.describes(path):
            raise LitLoraError(f"{name} of {self.repo} did not arrive as the Hub lists it: run the same command again")
        return path


@dataclass(frozen=True)
class Fetched:
    """A checkpoint folder that is complete, and which of its files were missing before."""

    folder: Path
    commit: str
    names: list[str]


def fetch_checkpoint(repo: Repo, checkpoint_root: Path, tokenizer_only: bool) -> Fetched:
    """Complete CHECKPOINT_ROOT/ORG/NAME with what litlora reads of a checkpoint.

    A file gets its name there only once it is whole and checked, and one that is there and intact is not fetched
    again, so that a run after an interrupted one goes on with what is missing.
    """
    folder = checkpoint_root / repo.id
    with _refusals_said(repo, checkpoint_root, "--checkpoint_root"):
        snapshot = Snapshot.of(repo)
        wanted = _tokenizer_files(snapshot) if tokenizer_only else _checkpoint_files(snapshot)
        checkpoint_root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=checkpoint_root, prefix=".download-") as staging:
            if INDEX in wanted:
                wanted += _shards(snapshot, folder, Path(staging))
            _refuse_leftovers(folder, wanted, repo)
            missing = [name for name in wanted if not snapshot.describes(folder / name)]
            _check_room(checkpoint_root, sum(snapshot.files[name].size or 0 for name in missing))
            for name in missing:
                _move(snapshot.fetch(name, Path(staging)), folder / name)
    return Fetched(folder, snapshot.commit, missing)


def fetch_dataset_file(repo_id: str, filename: str, token: str | None) -> Path:
    """Bring a file of a data set into huggingface_hub's own cache, unless it is there."""
    repo = Repo(repo_id, "dataset", "main", token)
    with _refusals_said(repo, Path(constants.HF_HUB_CACHE), "HF_HOME"):
        return Path(repo.api.hf_hub_download(repo_id, filename, repo_type=repo.kind, revision=repo.revision))


def _tokenizer_files(snapshot: Snapshot) -> list[str]:
    if not any(name in snapshot.files for name in TOKENIZERS):
        raise LitLoraError(f"{snapshot.repo} has no {' or '.join(TOKENIZERS)}, which are what litlora can read")
    return [name for name in SMALL_FILES + TERMS if name in snapshot.files]


def _checkpoint_files(snapshot: Snapshot) -> list[str]:
    """Name what is fetched, up to an index: the shards are those that it names."""
    if CONFIG not in snapshot.files:
        raise LitLoraError(f"{snapshot.repo} has no {CONFIG}, so it is not a checkpoint that litlora can read")
    weights = next((name for name in (INDEX, WEIGHTS) if name in snapshot.files), None)
    if weights is None:
        raise LitLoraError(_without_weights(snapshot))
    return [*_tokenizer_files(snapshot), weights]


def _without_weights(snapshot: Snapshot) -> str:
    repo = snapshot.repo
    pickles = sorted(name for name in snapshot.files if name.endswith(PICKLES))
    if not pickles:
        return f"{repo} has neither {WEIGHTS} nor {INDEX}, so it is not a checkpoint that litlora can read"
    reason = f"has only pickled weights ({pickles[0]}), and a pickle can run any code when it is read"
    hint = f"look at {repo.page}/discussions for a safetensors conversion and fetch it with --revision refs/pr/N"
    return f"{repo} {reason}: {hint}, or choose another repository"


def _shards(snapshot: Snapshot, folder: Path, staging: Path) -> list[str]:
    """Name the files that the index names; it is fetched unless it is in `folder`."""
    kept = folder / INDEX
    index = read_json(kept if snapshot.describes(kept) else snapshot.fetch(INDEX, staging))
    weight_map = index.get("weight_map")
    shards = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    unknown = [name for name in shards if name not in snapshot.files or not name.endswith(".safetensors")]
    if unknown or not shards:
        fault = f"names {unknown[0]}, which is no safetensors file of it" if unknown else "names no files"
        raise LitLoraError(f"{INDEX} of {snapshot.repo} {fault}: the repository is broken, so choose another")
    return shards


def _refuse_leftovers(folder: Path, wanted: list[str], repo: Repo) -> None:
    """Refuse to mix two checkpoints in one folder, where the other's weights or tokenizer could be read instead."""
    weights = ("*.safetensors", INDEX) if any(name.endswith(".safetensors") for name in wanted) else ()
    found = {path.name for pattern in (*SMALL_FILES, *weights) for path in folder.glob(pattern)}
    if leftovers := sorted(found - set(wanted)):
        fault = f"{folder} holds {leftovers[0]}, which is not of {repo} at revision {repo.revision}"
        raise LitLoraError(f"{fault}: move the folder away, or choose another --checkpoint_root")


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        room = f"{tqdm.format_sizeof(needed, 'B')} are to be fetched, but {folder} has room for"
        hint = "free some, or choose another --checkpoint_root"
        raise LitLoraError(f"{room} {tqdm.format_sizeof(free, 'B')}: {hint}")


def _move(source: Path, target: Path) -> None:
    """Give a complete file its final name, after its content is safe on the disk."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)


@contextmanager
def _refusals_said(repo: Repo, folder: Path, setting: str) -> Iterator[None]:
    """Say in one sentence why the Hub did not give `repo`, or why `folder`, which `setting` names, did not take it."""
    try:
        yield
    except (httpx2.HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
        # huggingface_hub wraps what went wrong when it has no copy of the file to fall back on.
        reason = (isinstance(error, LocalEntryNotFoundError) and error.__cause__) or error
        if isinstance(reason, OSError) and reason.errno:
            fault = f"cannot write into {folder} ({reason.strerror})"
            raise LitLoraError(f"{fault}: mend that, or choose another place with {setting}") from error
        raise LitLoraError(_refusal(reason, repo)) from error


def _refusal(error: BaseException, repo: Repo) -> str:
    match error:
        case HfHubHTTPError():
            return _answer(error, repo)
        case OfflineModeIsEnabled():
            return f"{repo} is not fetched, because HF_HUB_OFFLINE is set: unset it to reach the Hub"
        case FileMetadataError() | json.JSONDecodeError():
            return f"what answers at {constants.ENDPOINT} is not a Hub: check HF_ENDPOINT and the proxy"
    # Not only httpx2's errors: hf_xet, which moves large files, raises RuntimeError.
    fault = f"{repo} could not be fetched from {constants.ENDPOINT} ({str(error).partition(chr(10))[0]})"
    return f"{fault}: check the connection, and run the same command again to go on with what is missing"


def _answer(error: HfHubHTTPError, repo: Repo) -> str:
    status = error.response.status_code
    signed = repo.effective_token is not None
    if isinstance(error, GatedRepoError) and signed:  # before RepositoryNotFoundError, of which it is a kind
        hint = f"accept its licence at {repo.page} as the token's owner, and let the token read gated repositories"
        return f"{repo} is gated, and the access token has no access to it: {hint}"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: accept its licence at {repo.page}, then pass --access_token or set HF_TOKEN"
    if signed and status == 401:
        return f"the Hub does not know the access token: make a new one at {TOKEN_PAGE}"
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        hint = "that the access token may read it" if signed else "for a private one pass --access_token or HF_TOKEN"
        return f"there is no {repo} on the Hub, or it is private: check the name, and {hint}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {repo.revision}: see {repo.page}/tree/main for its branches and tags"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{repo} has no file {Path(error.response.url.path).name}: see {repo.page}/tree/main"
    phrase = f"{status} {error.response.reason_phrase}"
    return f"{constants.ENDPOINT} answers {phrase} for {repo}: run the same command again later"
