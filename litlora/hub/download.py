"""Downloading from the Hugging Face Hub, and its errors in one sentence each."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_token, hf_hub_url
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
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from tqdm import tqdm

from litlora import __version__
from litlora.errors import LitLoraError
from litlora.hub.filenames import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    LICENCES,
    PICKLES,
    TOKENIZER_FILES,
    TOKENIZERS,
    WEIGHTS,
)
from litlora.utils.files import read_json, sync

SMALL_FILES = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES)
TERMS = ("README.md", *LICENCES)
REPO_ID = re.compile(r"(?!.*(?:--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)  # the Hub's rules
STAGING = ".download"  # in the folder of a checkpoint: what of its files has arrived, until they are whole
TRANSIENT = {429, 500, 502, 503, 504}
WAITS = (1.0, 2.0, 4.0)  # seconds before the Hub is asked again, unless it says itself for how long
LONGEST_WAIT = 300.0
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
    def headers(self) -> dict[str, str]:
        """What the Hub's client sends along, the token among it; it does not follow a redirect to another host."""
        return build_hf_headers(token=self.token, library_name="litlora", library_version=__version__)

    @property
    def page(self) -> str:
        """The address of the repository for a person."""
        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.id}"


Answer = TypeVar("Answer")


def patiently(ask: Callable[[], Answer]) -> Answer:
    """Ask again a few times where the Hub is overloaded or has a fault of its own."""
    for wait in WAITS:
        try:
            return ask()
        except HfHubHTTPError as error:
            if error.response.status_code not in TRANSIENT:
                raise
            asked = error.response.headers.get("Retry-After", "")
            time.sleep(min(float(asked), LONGEST_WAIT) if asked.isdecimal() else wait)
    return ask()


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
        info = patiently(
            lambda: repo.api.model_info(repo.id, revision=repo.revision, files_metadata=True, timeout=timeout)
        )
        files = {file.rfilename: file for file in info.siblings or () if "/" not in file.rfilename}
        return cls(repo, str(info.sha), files)

    def describes(self, name: str, path: Path) -> bool:
        """Say whether a file on the disk is the one that the Hub lists by this name, from its size and hash."""
        listed = self.files[name]
        if not path.is_file() or path.stat().st_size != listed.size:
            return False
        with path.open("rb") as file:
            if listed.lfs:
                return hashlib.file_digest(file, "sha256").hexdigest() == listed.lfs.sha256
            blob = hashlib.sha1(b"blob %d\0" % listed.size, usedforsecurity=False)  # as git names a file's content
            return hashlib.file_digest(file, lambda: blob).hexdigest() == listed.blob_id

    def lacking(self, name: str, staging: Path) -> int:
        """Return how many bytes of a file have not arrived in `staging`."""
        path = staging / self._content_name(name)
        return (self.files[name].size or 0) - (path.stat().st_size if path.exists() else 0)

    def fetch(self, name: str, staging: Path) -> Path:
        """Bring a file into `staging`, on from where an earlier run was cut, and make sure it is what the Hub lists."""
        path = staging / self._content_name(name)
        patiently(lambda: self._go_on(name, path))
        if not self.describes(name, path):
            path.unlink()
            raise LitLoraError(f"{name} of {self.repo} did not arrive as the Hub lists it: run the same command again")
        return path

    def _content_name(self, name: str) -> str:
        """Return a name that is another for every other content, so that no bytes of two contents are mixed."""
        listed = self.files[name]
        return hashlib.sha256(f"{listed.blob_id} {listed.lfs and listed.lfs.sha256}".encode()).hexdigest()

    def _go_on(self, name: str, path: Path) -> None:
        with path.open("ab") as file:
            if file.tell() >= (self.files[name].size or 0):
                return
            # Not through hf_hub_download, whose transfers begin anew once their process is gone.
            http_get(
                hf_hub_url(self.repo.id, name, revision=self.commit),
                file,
                resume_size=file.tell(),
                headers=self.repo.headers | {"Accept-Encoding": "identity"},
                displayed_filename=name,
            )


@dataclass(frozen=True)
class Fetched:
    """A checkpoint folder that is complete, and which of its files were missing before."""

    folder: Path
    commit: str
    names: list[str]


def fetch_checkpoint(repo: Repo, checkpoint_root: Path, tokenizer_only: bool) -> Fetched:
    """Complete CHECKPOINT_ROOT/ORG/NAME with what litlora reads of a checkpoint.

    A file gets its name there only once it is whole and checked, and one that is there and intact is not fetched
    again, so that a run after an interrupted one goes on with what is missing, at the very byte.
    """
    folder = checkpoint_root / repo.id
    with _refusals_said(repo, checkpoint_root, "--checkpoint_root"):
        snapshot = Snapshot.of(repo)
        wanted = _tokenizer_files(snapshot) if tokenizer_only else _checkpoint_files(snapshot)
        with _staging(folder, repo) as staging:
            if INDEX in wanted:
                wanted += _shards(snapshot, folder, staging)
            _refuse_leftovers(folder, wanted, repo)
            missing = [name for name in wanted if not snapshot.describes(name, folder / name)]
            _check_room(checkpoint_root, sum(snapshot.lacking(name, staging) for name in missing))
            for name in missing:
                _move(snapshot.fetch(name, staging), folder / name)
            for partial in staging.iterdir():  # of another commit
                partial.unlink()
    return Fetched(folder, snapshot.commit, missing)


@contextmanager
def _staging(folder: Path, repo: Repo) -> Iterator[Path]:
    """Lend a place for files on their way, which one process has at a time; what is empty in the end vanishes."""
    staging = folder / STAGING
    lock = _lock(staging, repo)
    try:
        yield staging
    except LitLoraError:  # nothing of this repository is wanted, unlike after a cut transfer
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        for partial in staging.glob("*"):
            if not partial.stat().st_size:
                partial.unlink()
        for empty in (staging, folder, folder.parent):
            with suppress(OSError):  # something lies there
                empty.rmdir()
        os.close(lock)


def _lock(folder: Path, repo: Repo) -> int:
    """Make a folder, wait until no other process has it, and return the descriptor that keeps it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as closing:  # whoever had it before may have removed it
            lock = os.open(folder, os.O_RDONLY)
            closing.callback(os.close, lock)
            _wait(lock, repo)
            if os.path.samestat(os.fstat(lock), folder.stat()):
                closing.pop_all()
                return lock


def _wait(lock: int, repo: Repo) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.stderr.write(f"waiting for another download of {repo}\n")
        fcntl.flock(lock, fcntl.LOCK_EX)


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
    index = read_json(kept if snapshot.describes(INDEX, kept) else snapshot.fetch(INDEX, staging))
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
    sync(source)
    source.replace(target)
    sync(target.parent)


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
    # Not only httpx2's errors: hf_xet, which moves a data set's large files, raises RuntimeError.
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
