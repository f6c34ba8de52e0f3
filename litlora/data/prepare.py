"""From a source to a prepared data set: the steps that the prepare commands share."""

import re
from dataclasses import replace
from hashlib import file_digest
from http.client import HTTPException, IncompleteRead
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from litlora import __version__
from litlora.args import PrepareArgs
from litlora.data.checks import run_checks
from litlora.data.dataset import read_file, split, write_dataset
from litlora.data.readers import RawFile
from litlora.data.row_formats import RowFormat
from litlora.errors import LitLoraError
from litlora.utils.console import log

TIMEOUT_SECONDS = 30  # without a byte, not for the whole transfer


def prepare(args: PrepareArgs, file: RawFile, row_format: RowFormat) -> None:
    """Read and check every row of `file`, split them, and only then write them."""
    rows = read_file(replace(file, encoding=args.encoding), row_format)
    for finding in run_checks(rows):
        log(str(finding))
    train, val = split([row.example for _, row in rows], args.val_split_fraction, args.seed)
    origin = {
        "source": without_query(args.source) if "://" in args.source else args.source,
        "sha256": _digest(file),
        "val_split_fraction": args.val_split_fraction,
        "seed": args.seed,
    }
    write_dataset(args.destination_path, train, val, origin)
    counts = f"{len(train):,} training and {len(val):,} validation examples"
    log(f"{counts} in {args.destination_path}")


def _digest(file: RawFile) -> str:
    with file.open() as opened:
        return file_digest(opened, "sha256").hexdigest()


def fetch(source: str) -> RawFile:
    """Read the local file, or fetch the http(s) address, that `source` names."""
    if "://" in source:
        content = _download(source)
        return RawFile.from_bytes(without_query(source), PurePosixPath(urlsplit(source).path).suffix, content)
    return RawFile.from_path(Path(source), f"there is no file {source}; give --source a file or an http(s) address")


def _download(url: str) -> bytes:
    shown = without_query(url)
    if not url.lower().startswith(("http://", "https://")):
        raise LitLoraError(f"--source ({shown}) must be a file or an address that starts with http:// or https://")
    if re.match("[^/]*//[^/?#]*@", url):
        fault = "contains a user name or password, which would be written to dataset.json"
        raise LitLoraError(f"--source {fault}: download the file yourself and give its path")
    log(f"fetching {shown}")
    try:
        request = Request(url, headers={"User-Agent": f"litlora/{__version__}"})
        with urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            content: bytes = response.read()
    except (OSError, HTTPException, ValueError) as error:
        raise LitLoraError(f"{shown} cannot be fetched: {without_query(str(_reason(error)))}") from error
    # No row starts with <, and a server may send an HTML page with any status and content type.
    if content.lstrip().startswith(b"<"):
        raise LitLoraError(f"{shown} is a web page, not data; give --source the address of the raw file")
    return content


def without_query(url: str) -> str:
    """Return an address without its query, which may contain a token or a signature."""
    return re.sub(r"[?#].*", "?...", url, flags=re.DOTALL)


def _reason(error: Exception) -> object:
    match error:
        case HTTPError():
            error.close()
            return f"the server returned {error.code} {error.reason}"
        case IncompleteRead():
            return f"the transfer ended after {len(error.partial):,} bytes; try again"
        case URLError():
            return error.reason
        case _:
            return error
