"""Downloads of checkpoints: the files that litlora reads, each verified before it has its final name."""

import fcntl
import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from rich.filesize import decimal

from litlora.errors import LitLoraError
from litlora.hub.client import Repo, check_commit, refusing_malformed, reporting_errors, with_retries
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
from litlora.utils.console import log
from litlora.utils.files import open_own, read_json, refuse_link, sync
from litlora.utils.locks import reporting_lock_errors

SMALL_FILES = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES)
TERMS = ("README.md", *LICENCES)
NAME = re.compile(r"[\w][\w.+ -]{0,200}", re.ASCII)  # of a file; others are left alone
LICENSE = re.compile(r"[\w.+ -]{1,80}", re.ASCII)
STAGING = ".download"  # folder of partial files inside a checkpoint folder


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
