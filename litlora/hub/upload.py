"""Uploads to the Hugging Face Hub, each as one commit, whose errors become one sentence each."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx2
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from litlora.errors import LitLoraError
from litlora.hub.client import TOKEN_PAGE, Repo, endpoint, with_retries

MAIN = "main"
WEIGHT_FILES = (".safetensors", ".gguf", ".index.json", ".bin", "adapter_config.json")
"""How the names of files end of which a repository must not have another model's."""


def upload(repo: Repo, files: Mapping[str, bytes | str], *, private: bool, message: str) -> str:
    """Commit files, given as contents or paths by name, to a repository that is created if need be; return its page."""
    if repo.effective_token is None:
        raise LitLoraError(f"uploading to {repo} needs an access token: pass --access_token, or set HF_TOKEN")
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    with reporting_errors(repo):
        with_retries(lambda: repo.api.create_repo(repo.id, private=private, exist_ok=True))
        if repo.revision != MAIN:
            with_retries(lambda: repo.api.create_branch(repo.id, branch=repo.revision, exist_ok=True))
        _check_repository(repo, set(files), private=private)
        with_retries(
            lambda: repo.api.create_commit(repo.id, operations, commit_message=message, revision=repo.revision)
        )
    return f"{repo.page}/tree/{repo.revision}"


def _check_repository(repo: Repo, names: set[str], *, private: bool) -> None:
    """Refuse a public repository where a private one is requested, and one with the weights of another model."""
    info = with_retries(lambda: repo.api.model_info(repo.id, revision=repo.revision))
    if private and info.private is False:
        raise LitLoraError(f"{repo} is there already and public: make it private at {repo.page}/settings")
    stored = {file.rfilename for file in info.siblings or ()}
    if others := sorted(name for name in stored - names if name.endswith(WEIGHT_FILES)):
        fault = f"{repo} has {others[0]}, which is of another model"
        raise LitLoraError(f"{fault}: delete it there, or choose another --repo_id or --revision")


@contextmanager
def reporting_errors(repo: Repo) -> Iterator[None]:
    """Turn errors of the Hub or of the connection into a LitLoraError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:  # it takes any answer for one of a Hub
        raise LitLoraError(f"the server at {endpoint()} is not a Hub: check HF_ENDPOINT and the proxy") from error
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise LitLoraError(_explain(error, repo)) from error


def _explain(error: BaseException, repo: Repo) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return f"nothing can be uploaded to {repo} while HF_HUB_OFFLINE is set: unset it"
    if not isinstance(error, HfHubHTTPError):
        cause = str(error.__cause__ or error).partition("\n")[0]
        fault = f"{repo} could not be reached at {endpoint()} ({cause})"
        return f"{fault}: check the connection, and run the same command again"
    status = error.response.status_code
    if status == 401:
        return f"the Hub rejects the access token: create a new one at {TOKEN_PAGE}"
    if status in (402, 403, 404):
        hint = f"let it write there at {TOKEN_PAGE}, or choose another --repo_id"
        return f"the access token may not write to {repo}: {hint}"
    if status == 413:
        return f"{repo} does not take files as large: {error.response.reason_phrase}"
    phrase = f"{status} {error.response.reason_phrase}"
    return f"{endpoint()} returned {phrase} for {repo}: run the same command again later"
