"""Sources of rows: local files, http(s) addresses and data sets on the Hub, each with its share of a mixture."""

import os
import random
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
from numpy.typing import NDArray

from litlora import __version__
from litlora.args.common import revealed
from litlora.args.data import PrepareArgs
from litlora.data.readers.parsers import FORMATS, PARSERS
from litlora.data.readers.raw_files import RawFile, read_chunks, suffix_of
from litlora.errors import LitLoraError
from litlora.hub.client import REPO_ID
from litlora.hub.datasets import fetch_dataset
from litlora.utils.console import log
from litlora.utils.files import scratch_file

TIMEOUT_SECONDS = 30  # without a byte, not for the whole transfer
WEIGHTED = re.compile(r"(.+)=(\d+(?:\.\d*)?|\.\d+)", re.DOTALL)
PAGE = re.compile(rb"\s*<")
"""No row starts so, and a server may send an HTML page with any status and content type."""
BEGINNING = 1 << 12  # bytes in which a page's first character is looked for


@dataclass(frozen=True)
class Source:
    """One value of --source, its files, and its weight in the mixture."""

    name: str
    files: Sequence[RawFile]
    weight: float | None = None

    def sha256(self) -> str:
        """Return the hash of the content of all files."""
        digest = sha256()
        for file in self.files:
            with file.open() as opened:
                for chunk in read_chunks(opened):
                    digest.update(chunk)
        return digest.hexdigest()


def split_weight(source: str) -> tuple[str, float | None]:
    """Part a source such as rows.jsonl=0.7 from its weight; the query of an address may end in a number as well."""
    match = WEIGHTED.fullmatch(source)
    if match is None or ("://" in source and "?" in source) or Path(source).exists():
        return source, None
    if not float(match[2]):
        raise LitLoraError("a weight of --source must be above 0: leave the source out instead")
    return match[1], float(match[2])


def local_path(source: str) -> Path | None:
    """Return the path that a source names, unless it is an address or a data set on the Hub."""
    path = Path(source).expanduser()
    is_known = (
        path.exists() or suffix_of(path.name).lower() in PARSERS or (len(path.parts) > 1 and path.parent.is_dir())
    )
    is_local = "://" not in source and (is_known or REPO_ID.fullmatch(source) is None)
    return path if is_local else None


def open_source(text: str, args: PrepareArgs, fetched: ExitStack, flag: str = "--source") -> Source:
    """Find the files of a source, and fetch those that are elsewhere, which stay until `fetched` is closed."""
    source, weight = split_weight(text) if flag == "--source" else (text, None)
    path = local_path(source)
    if path is not None and path.is_dir():
        raise LitLoraError(f"{flag} ({source}) is a folder: give it one of its files")
    if path is not None:
        missing = f"there is no file {source}; give {flag} a file, an http(s) address, or ORG/NAME of the Hub"
        files: Sequence[RawFile] = [RawFile.from_path(path, missing)]
    elif "://" in source:
        files = [_fetch(source, args.destination_path, fetched)]
    else:
        files = _fetch_dataset(source, args)
    files = [replace(file, encoding=args.encoding) for file in files]
    return Source(without_query(source) if "://" in source else source, files, weight)


def _fetch_dataset(repo_id: str, args: PrepareArgs) -> list[RawFile]:
    files = fetch_dataset(repo_id, args.split, args.subset, tuple(FORMATS), revealed(args.access_token))
    return [replace(RawFile.from_path(path, f"no {path}"), name=f"{repo_id}/{name}") for name, path in files.items()]


def _fetch(url: str, beside: Path, fetched: ExitStack) -> RawFile:
    """Fetch a file onto the disk on which the data set is written."""
    _check_address(url)
    shown = without_query(url)
    log(f"fetching {shown}")
    file = fetched.enter_context(scratch_file(beside))
    try:
        _download(url, file)
    except IncompleteRead as error:
        fault = f"the transfer ended after {file.tell():,} bytes"
        raise LitLoraError(f"{shown} cannot be fetched: {fault}; try again") from error
    except (OSError, HTTPException, ValueError) as error:
        raise LitLoraError(f"{shown} cannot be fetched: {without_query(str(_reason(error)))}") from error
    if PAGE.match(os.pread(file.fileno(), BEGINNING, 0)):
        raise LitLoraError(f"{shown} is a web page, not data; give --source the address of the raw file")
    return RawFile.from_descriptor(shown, suffix_of(urlsplit(url).path), file.fileno())


def _check_address(url: str) -> None:
    if not url.lower().startswith(("http://", "https://")):
        fault = "must be a file or an address that starts with http:// or https://"
        raise LitLoraError(f"--source ({without_query(url)}) {fault}")
    if re.match("[^/]*//[^/?#]*@", url):
        fault = "contains a user name or password, which would be written to dataset.json"
        raise LitLoraError(f"--source {fault}: download the file yourself and give its path")


def _download(url: str, file: BinaryIO) -> None:
    request = Request(url, headers={"User-Agent": f"litlora/{__version__}"})
    with urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        for chunk in read_chunks(response):
            file.write(chunk)
        if response.length:  # bytes that are missing, which only a read of all at once reports by itself
            raise IncompleteRead(b"")
    file.flush()


def without_query(url: str) -> str:
    """Return an address without its query, which may contain a token or a signature."""
    return re.sub(r"[?#].*", "?...", url, flags=re.DOTALL)


def _reason(error: Exception) -> object:
    match error:
        case HTTPError():
            error.close()
            return f"the server returned {error.code} {error.reason}"
        case URLError():
            return error.reason
        case _:
            return error


def mix(counts: Sequence[int], weights: Sequence[float | None], seed: int) -> list[NDArray[np.int64]]:
    """Return which rows of each source make up a mixture of these weights, as large as it can be without repetition."""
    given = [weight for weight in weights if weight is not None]
    if not given:
        return [np.arange(count) for count in counts]
    if len(given) < len(weights):
        raise LitLoraError("--source: give each source a weight, such as rows.jsonl=0.7, or none of them")
    size = min(count / weight for count, weight in zip(counts, given, strict=True))
    rng = random.Random(seed)
    wanted = [max(1, round(size * weight)) for weight in given]
    return [np.sort(rng.sample(range(count), number)) for count, number in zip(counts, wanted, strict=True)]
