"""Downloads from the Hugging Face Hub, whose errors become one sentence each."""

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

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
from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]
from rich.filesize import decimal

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
from litlora.hub.origin import Origin, origin, write_origin
from litlora.utils.console import log, redacted
from litlora.utils.files import open_own, read_json, refuse_link, sync
from litlora.utils.locks import reporting_lock_errors

SMALL_FILES = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES)
TERMS = ("README.md", *LICENCES)
REPO_ID = re.compile(r"(?!.*(?:--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)  # the Hub's rules
NAME = re.compile(r"[\w][\w.+ -]{0,200}", re.ASCII)  # of a file; others are left alone
COMMIT = re.compile("[0-9a-f]{1,64}")
LICENSE = re.compile(r"[\w.+ -]{1,80}", re.ASCII)
STAGING = ".download"  # folder of partial files inside a checkpoint folder
TRANSIENT = {429, 500, 502, 503, 504}
WAITS = (1.0, 2.0, 4.0)  # seconds before a retry, unless the Hub sends Retry-After
LONGEST_WAIT = 300.0
LISTING = re.compile("/api/(models|datasets)/")  # in the path of an address
MOST_LISTED, LONGEST_LISTING = 100_000_000, 120.0  # bytes and seconds of a listing
LEAST_BYTES, WINDOW = 3_000_000, 300.0  # of a body that arrive in these seconds of waiting: 10 kB a second
TOKEN_PAGE = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Repo:
    """A revision of a repository on the Hub, accessed with a token."""

    id: str
    kind: Literal["model", "dataset"]
    revision: str
    token: str | None

    def __post_init__(self) -> None:
        if not REPO_ID.fullmatch(self.id):
            raise LitLoraError(f"{self.id!r} is not a repository id of the Hub: write ORG/NAME")
        if self.effective_token and not re.fullmatch("[!-~]+", self.effective_token):
            fault = "contains a space, a line break or a non-ASCII character"
            raise LitLoraError(f"the access token {fault}: copy it again from {TOKEN_PAGE}")

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"

    @property
    def effective_token(self) -> str | None:
        """The token that is sent: this one, or else that of the environment or of the logged-in user."""
        return self.token or get_token()

    @property
    def api(self) -> HfApi:
        """The Hub's client for this token, which takes no endless answer and does not wait for one for ever."""
        session, hooks = get_session(), get_session().event_hooks
        session.timeout = WINDOW  # of requests that huggingface_hub gives no time limit, those of an upload
        if _read_bounded not in hooks["response"]:
            session.event_hooks = hooks | {"response": [*hooks["response"], _pace, _read_bounded]}
        return HfApi(token=self.token, library_name="litlora", library_version=__version__)

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a request, including the token; a redirect to another host drops the token."""
        return build_hf_headers(token=self.token, library_name="litlora", library_version=__version__)

    @property
    def page(self) -> str:
        """The repository's web page."""
        return f"{endpoint()}/{'datasets/' if self.kind == 'dataset' else ''}{self.id}"


def _pace(response: httpx2.Response) -> None:
    assert isinstance(response.stream, httpx2.SyncByteStream)
    response.stream = _PacedStream(response.stream)


class _PacedStream(httpx2.SyncByteStream):
    """The body of an answer, which ends where it trickles: a time limit for each read alone is never reached then."""

    def __init__(self, stream: httpx2.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        waited, arrived, since = 0.0, 0, time.monotonic()
        for piece in self._stream:
            waited, arrived = waited + time.monotonic() - since, arrived + len(piece)
            if waited > WINDOW:
                if arrived < LEAST_BYTES:
                    # Not a TimeoutException, after which huggingface_hub would wait as long five times more
                    raise httpx2.ReadError(f"only {decimal(arrived)} have arrived in {waited:.0f} seconds")
                waited, arrived = 0.0, 0
            yield piece
            since = time.monotonic()

    def close(self) -> None:
        self._stream.close()


def _read_bounded(response: httpx2.Response) -> None:
    """Read a listing or a redirect here: huggingface_hub would take one of any size, also what unpacks to it."""
    if not LISTING.search(response.url.path) and not response.has_redirect_location:
        return
    content, deadline = bytearray(), time.monotonic() + LONGEST_LISTING
    for piece in response.iter_bytes():
        content += piece
        if len(content) > MOST_LISTED or time.monotonic() > deadline:
            limits = f"{MOST_LISTED / 1e6:.0f} MB or {LONGEST_LISTING:.0f} seconds"
            raise httpx2.RemoteProtocolError(f"the list of its files does not end within {limits}")
    response._content = bytes(content)  # as its read() does, which then does nothing


Response = TypeVar("Response")


def with_retries(request: Callable[[], Response]) -> Response:
    """Retry a request a few times if the Hub is overloaded or has an internal error."""
    for wait in WAITS:
        try:
            return request()
        except HfHubHTTPError as error:
            if error.response.status_code not in TRANSIENT:
                raise
            delay = error.response.headers.get("Retry-After", "")
            time.sleep(min(float(delay), LONGEST_WAIT) if delay.isdecimal() else wait)
    return request()


@dataclass(frozen=True)
class Snapshot:
    """One commit of a model's repository: its top-level files by name."""

    repo: Repo
    commit: str
    license: str | None
    files: Mapping[str, RepoSibling]

    @classmethod
    def request(cls, repo: Repo) -> "Snapshot":
        """Request the list of files once, so that all fetched files are of one commit."""
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        with refusing_malformed(repo):
            info = with_retries(
                lambda: repo.api.model_info(repo.id, revision=repo.revision, files_metadata=True, timeout=timeout)
            )
            files = {file.rfilename: file for file in info.siblings or () if _is_usable(file)}
            check_commit(info.sha)
        license = getattr(info.card_data, "license", None)
        return cls(repo, str(info.sha), license if LICENSE.fullmatch(str(license)) else None, files)

    def matches(self, name: str, path: Path) -> bool:
        """Return whether a local file has the size and hash that the Hub lists for this name."""
        listed = self.files[name]
        if not path.is_file() or path.stat().st_size != listed.size:
            return False
        with path.open("rb") as file:
            if listed.lfs:
                return hashlib.file_digest(file, "sha256").hexdigest() == listed.lfs.sha256
            blob = hashlib.sha1(b"blob %d\0" % listed.size, usedforsecurity=False)  # git's object id
            return hashlib.file_digest(file, lambda: blob).hexdigest() == listed.blob_id

    def missing_bytes(self, name: str, staging: Path) -> int:
        """Return how many bytes of a file are not yet in `staging`."""
        path = staging / self._content_name(name)
        return (self.files[name].size or 0) - (path.stat().st_size if path.exists() else 0)

    def fetch(self, name: str, staging: Path) -> Path:
        """Fetch a file into `staging`, resuming an earlier transfer, and verify its hash."""
        path = staging / self._content_name(name)
        with suppress(_TooLongError):
            with_retries(lambda: self._resume(name, path))
        if not self.matches(name, path):
            path.unlink()
            raise LitLoraError(
                f"{name} of {self.repo} does not have the size and hash that the Hub lists: run the same command again"
            )
        return path

    def _content_name(self, name: str) -> str:
        """Return a file name that depends on the content, so that a resumed transfer never mixes two contents."""
        listed = self.files[name]
        return hashlib.sha256(f"{listed.blob_id} {listed.lfs and listed.lfs.sha256}".encode()).hexdigest()

    def _resume(self, name: str, path: Path) -> None:
        size = self.files[name].size or 0
        with _BoundedWriter(io.FileIO(path, "ab", opener=open_own), size) as file:
            if file.tell() >= size:
                return
            # Not hf_hub_download, which does not resume the transfer of a killed process
            http_get(
                hf_hub_url(self.repo.id, name, revision=self.commit),
                file,
                resume_size=file.tell(),
                headers=self.repo.headers | {"Accept-Encoding": "identity"},
                displayed_filename=name,
            )


class _TooLongError(Exception):
    """A server sends more of a file than it lists."""


class _BoundedWriter(io.BufferedWriter):
    """A file that takes no more bytes than the Hub has listed for it."""

    def __init__(self, raw: io.FileIO, limit: int) -> None:
        super().__init__(raw)
        self.limit = limit

    def write(self, content: Any) -> int:
        if self.tell() + len(content) > self.limit:
            raise _TooLongError
        return super().write(content)


def _is_usable(file: RepoSibling) -> bool:
    """Tell whether a listed file is one of the top level with a harmless name; TypeError for a listing that is none."""
    if not isinstance(file.rfilename, str) or not isinstance(file.size, int | None):
        raise TypeError("names are texts and sizes are numbers")
    return NAME.fullmatch(file.rfilename) is not None


@contextmanager
def refusing_malformed(repo: Repo) -> Iterator[None]:
    """Turn errors about an unexpected type or value into a LitLoraError: huggingface_hub takes a listing as it is."""
    try:
        yield
    except json.JSONDecodeError:  # of a server that is no Hub at all
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fault = f"lists the files of {repo} as no Hub does"
        raise LitLoraError(f"the server at {endpoint()} {fault}: check HF_ENDPOINT") from error


def check_commit(commit: str | None) -> None:
    """Refuse what is no hash of a commit: it becomes a part of addresses and paths."""
    if not COMMIT.fullmatch(str(commit)):
        raise ValueError("a commit is a hexadecimal number")


def endpoint() -> str:
    """Return the Hub's address without the password that HF_ENDPOINT may have."""
    return redacted(constants.ENDPOINT)


@dataclass(frozen=True)
class Fetched:
    """A complete checkpoint folder, and the names of the files that were fetched."""

    folder: Path
    commit: str
    names: list[str]


def fetch_checkpoint(repo: Repo, checkpoint_root: Path, tokenizer_only: bool) -> Fetched:
    """Fetch the files of CHECKPOINT_ROOT/ORG/NAME that litlora reads and that are missing or corrupt there.

    A file gets its final name once it is complete and verified; an interrupted transfer is resumed at its last byte.
    """
    folder = checkpoint_root / repo.id
    with reporting_errors(repo, checkpoint_root, "--checkpoint_root"):
        snapshot = Snapshot.request(repo)
        wanted = _tokenizer_files(snapshot) if tokenizer_only else _checkpoint_files(snapshot)
        with _staging(folder, repo) as staging:
            if INDEX in wanted:
                wanted += _shards(snapshot, folder, staging)
            _refuse_leftovers(folder, wanted, repo)
            missing = [name for name in wanted if not snapshot.matches(name, folder / name)]
            _check_disk_space(checkpoint_root, sum(snapshot.missing_bytes(name, staging) for name in missing))
            for name in missing:
                _publish(snapshot.fetch(name, staging), folder / name)
            for partial in staging.iterdir():  # of another commit
                partial.unlink()
        if not tokenizer_only:
            _record_origin(folder, Origin(repo.id, snapshot.commit, snapshot.license))
    return Fetched(folder, snapshot.commit, missing)


def _record_origin(folder: Path, source: Origin) -> None:
    with suppress(LitLoraError):  # an invalid record is replaced
        if origin(folder) == source:
            return
    write_origin(folder, source)


@contextmanager
def _staging(folder: Path, repo: Repo) -> Iterator[Path]:
    """Yield the folder for partial files, locked by this process; remove it at the end if it is empty."""
    staging = folder / STAGING
    lock = _lock(staging, repo)
    try:
        yield staging
    except LitLoraError:  # refused: nothing will be resumed, unlike after an interrupted transfer
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        for partial in staging.glob("*"):
            if not partial.stat().st_size:
                partial.unlink()
        for empty in (staging, folder, folder.parent):
            with suppress(OSError):  # not empty
                empty.rmdir()
        os.close(lock)


def _lock(folder: Path, repo: Repo) -> int:
    """Create and lock a folder, waiting for other processes; return the descriptor that holds the lock."""
    while True:
        refuse_link(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as closing:  # its previous owner may have removed it
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            closing.callback(os.close, lock)
            with reporting_lock_errors(folder):
                _acquire(lock, repo)
            if os.path.samestat(os.fstat(lock), folder.stat()):
                closing.pop_all()
                return lock


def _acquire(lock: int, repo: Repo) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log(f"waiting for another download of {repo}")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _tokenizer_files(snapshot: Snapshot) -> list[str]:
    if not any(name in snapshot.files for name in TOKENIZERS):
        raise LitLoraError(f"{snapshot.repo} has no {' or '.join(TOKENIZERS)}, and litlora needs one of them")
    return [name for name in SMALL_FILES + TERMS if name in snapshot.files]


def _checkpoint_files(snapshot: Snapshot) -> list[str]:
    """Return the files to fetch, except for the shards that the index names."""
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
    """Return the shards that the index names, fetching the index unless `folder` has it."""
    local = folder / INDEX
    index = read_json(local if snapshot.matches(INDEX, local) else snapshot.fetch(INDEX, staging))
    weight_map = index.get("weight_map")
    shards = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    unknown = [name for name in shards if name not in snapshot.files or not name.endswith(".safetensors")]
    if unknown or not shards:
        fault = f"names {unknown[0]}, which is not one of its safetensors files" if unknown else "names no files"
        raise LitLoraError(f"{INDEX} of {snapshot.repo} {fault}: the repository is broken, so choose another")
    return shards


def _refuse_leftovers(folder: Path, wanted: list[str], repo: Repo) -> None:
    """Refuse a folder with files of another checkpoint, which could be read instead."""
    weights = ("*.safetensors", INDEX) if any(name.endswith(".safetensors") for name in wanted) else ()
    found = {path.name for pattern in (*SMALL_FILES, *weights) for path in folder.glob(pattern)}
    if leftovers := sorted(found - set(wanted)):
        fault = f"{folder} contains {leftovers[0]}, which is not part of {repo} at revision {repo.revision}"
        raise LitLoraError(f"{fault}: move the folder away, or choose another --checkpoint_root")


def _check_disk_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        fault = f"the download needs {decimal(needed)}, but {folder} has {decimal(free)}"
        raise LitLoraError(f"{fault}: free some space, or choose another --checkpoint_root")


def _publish(source: Path, target: Path) -> None:
    """Sync a complete file and give it its final name."""
    sync(source)
    source.replace(target)
    sync(target.parent)


@contextmanager
def reporting_errors(repo: Repo, folder: Path, setting: str) -> Iterator[None]:
    """Turn errors of the Hub, or of writing to `folder`, which `setting` names, into a LitLoraError."""
    try:
        yield
    except (httpx2.HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
        # huggingface_hub wraps the error if its cache does not have the file
        reason = (isinstance(error, LocalEntryNotFoundError) and error.__cause__) or error
        if isinstance(reason, OSError) and reason.errno:
            fault = f"cannot write to {folder} ({reason.strerror})"
            raise LitLoraError(f"{fault}: fix that, or choose another folder with {setting}") from error
        raise LitLoraError(_explain(reason, repo)) from error


def _explain(error: BaseException, repo: Repo) -> str:
    match error:
        case HfHubHTTPError():
            return _explain_response(error, repo)
        case OfflineModeIsEnabled():
            return f"{repo} cannot be fetched while HF_HUB_OFFLINE is set: unset it"
        case FileMetadataError() | json.JSONDecodeError():
            return f"the server at {endpoint()} is not a Hub: check HF_ENDPOINT and the proxy"
    # Not only errors of httpx2: hf_xet, which transfers large files of data sets, raises RuntimeError
    fault = f"{repo} could not be fetched from {endpoint()} ({str(error).partition(chr(10))[0]})"
    return f"{fault}: check the connection, and run the same command again to resume"


def _explain_response(error: HfHubHTTPError, repo: Repo) -> str:
    status = error.response.status_code
    has_token = repo.effective_token is not None
    if isinstance(error, GatedRepoError) and has_token:  # before RepositoryNotFoundError, its base class
        hint = f"accept its licence at {repo.page} as the token's owner, and let the token read gated repositories"
        return f"{repo} is gated, and the access token has no access to it: {hint}"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: accept its licence at {repo.page}, then pass --access_token or set HF_TOKEN"
    if has_token and status == 401:
        return f"the Hub rejects the access token: create a new one at {TOKEN_PAGE}"
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        hint = "that the access token may read it" if has_token else "for a private one pass --access_token or HF_TOKEN"
        return f"there is no {repo} on the Hub, or it is private: check the name, and {hint}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {repo.revision}: see {repo.page}/tree/main for its branches and tags"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{repo} has no file {Path(error.response.url.path).name}: see {repo.page}/tree/main"
    phrase = f"{status} {error.response.reason_phrase}"
    return f"{endpoint()} returned {phrase} for {repo}: run the same command again later"
