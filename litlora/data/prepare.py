"""From a source to a prepared data set: what the prepare commands share."""

import re
import sys
from collections.abc import Sequence
from hashlib import sha256
from http.client import HTTPException, IncompleteRead
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from litlora import __version__
from litlora.args import PrepareArgs
from litlora.data.examples import RowFormat, read_file, split, write_dataset
from litlora.data.readers import RawFile
from litlora.errors import LitLoraError

TIMEOUT_SECONDS = 30  # of silence, not of the whole transfer


def prepare(args: PrepareArgs, file: RawFile, row_format: RowFormat) -> None:
    """Read and check every row of `file`, split them, and only then write; talk about it on stderr."""
    rows = read_file(file, row_format)
    empty = [place for place, row in rows if any(not turn.output for turn in row.example.turns)]
    _report(empty, "with an empty output", "it teaches the model to stop at once")
    cut = [place for place, row in rows if row.left_out]
    _report(cut, "ending in a question without an answer", "that question is left out")
    train, val = split([row.example for _, row in rows], args.val_split_fraction, args.seed)
    origin = {
        "source": without_query(args.source) if "://" in args.source else args.source,
        "sha256": sha256(file.content).hexdigest(),
        "val_split_fraction": args.val_split_fraction,
        "seed": args.seed,
    }
    write_dataset(args.destination_path, train, val, origin)
    counts = f"{len(train):,} training and {len(val):,} validation examples"
    _say(f"{counts} in {args.destination_path}")


def _report(places: Sequence[str], what: str, meaning: str) -> None:
    if places:
        rows = "1 row" if len(places) == 1 else f"{len(places):,} rows"
        _say(f"{rows} {what}, the first at {places[0]}: {meaning}")


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def fetch(source: str) -> RawFile:
    """Read the file or the http(s) address that `source` names."""
    if "://" in source:
        content = _download(source)
        return RawFile(without_query(source), PurePosixPath(urlsplit(source).path).suffix, content)
    return RawFile.from_path(Path(source), f"there is no file {source}; give --source a file or an http(s) address")


def _download(url: str) -> bytes:
    shown = without_query(url)
    if not url.lower().startswith(("http://", "https://")):
        raise LitLoraError(f"--source ({shown}) must be a file or an address that starts with http:// or https://")
    if re.match("[^/]*//[^/?#]*@", url):
        fault = "holds a user name or password, which would stand in dataset.json"
        raise LitLoraError(f"--source {fault}: fetch the file yourself, and give its path")
    _say(f"fetching {shown}")
    try:
        request = Request(url, headers={"User-Agent": f"litlora/{__version__}"})
        with urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            content: bytes = response.read()
    except (OSError, HTTPException, ValueError) as error:
        raise LitLoraError(f"{shown} cannot be fetched: {without_query(str(_reason(error)))}") from error
    # No row starts so, and a server may send its page for people with any status and content type.
    if content.lstrip().startswith(b"<"):
        raise LitLoraError(f"{shown} is a web page, not data; give --source the address of the raw file")
    return content


def without_query(url: str) -> str:
    """Return an address without what may hold a token or a signature."""
    return re.sub(r"[?#].*", "?...", url, flags=re.DOTALL)


def _reason(error: Exception) -> object:
    match error:
        case HTTPError():
            error.close()
            return f"the server says {error.code} {error.reason}"
        case IncompleteRead():
            return f"it was cut off after {len(error.partial):,} bytes; try again"
        case URLError():
            return error.reason
        case _:
            return error
