"""Requests to the Hugging Face Hub: a revision of a repository, retries, limits of what is received, and errors."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

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
from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]
from rich.filesize import decimal

from litlora import __version__
from litlora.errors import LitLoraError
from litlora.utils.console import redacted

REPO_ID = re.compile(r"(?!.*(?:--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)  # the Hub's rules
COMMIT = re.compile("[0-9a-f]{1,64}")
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
