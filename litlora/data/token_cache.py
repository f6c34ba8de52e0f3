"""The token cache: the tokens of a data folder's splits, saved beside the data and memory-mapped."""

import json
import mmap
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from litlora.data.checks.rows import NAMES
from litlora.data.split_encoder import SplitEncoder, content_of
from litlora.data.tokens import ABOUT as ABOUT_TYPE
from litlora.data.tokens import Tokens
from litlora.errors import LitLoraError
from litlora.utils.console import log
from litlora.utils.files import atomic_directory, check_writable, digest, read_json, refuse_link, remove_unlocked

FOLDER = "tokenized"
IDS, OFFSETS, FIRST_LABELS, ABOUT = "ids.int32", "offsets.int64", "first_labels.int32", "about.records"
MANIFEST = "manifest.json"
ABANDONED = 24 * 3600  # seconds after which no process still writes a temporary folder
RETAINED = 4  # entries of each split: for other tokenizers, prompt styles and rows


class Split(NamedTuple):
    """A split of a data folder, the name of its entry in the cache, and a hash of its content."""

    path: Path
    name: str
    content: str

    @property
    def folder(self) -> Path:
        """The folder of the entry."""
        return self.path.parent / FOLDER / self.name


def find_split(path: Path, encoder: SplitEncoder) -> Split:
    """Return a split with the name of its cache entry; LitLoraError if the split is missing."""
    content = content_of(path)
    return Split(path, f"{path.stem}-{encoder.key(content)}", content)


def open_splits(splits: Sequence[Split], encoder: SplitEncoder) -> list[Tokens]:
    """Return the tokens of splits of one data folder, tokenizing those that the cache lacks."""
    missing = [split for split in splits if not _is_cached(split.folder)]
    if not missing:
        return [_map(split.folder) for split in splits]
    with _writable_cache(splits[0].folder.parent) as cache:
        opened = _open(splits, missing, cache, encoder)
        for split in missing:
            _prune(cache, split.path.stem, {each.name for each in splits})
        return opened


def peek_splits(splits: Sequence[Split], encoder: SplitEncoder) -> list[Tokens]:
    """Return the same, but leave the cache as it is: what it lacks is tokenized into a temporary folder."""
    missing = [split for split in splits if not _is_intact(split.folder)]
    with TemporaryDirectory() as cache:
        return _open(splits, missing, Path(cache), encoder)


def _open(splits: Sequence[Split], missing: Sequence[Split], cache: Path, encoder: SplitEncoder) -> list[Tokens]:
    """Tokenize the missing splits into a cache, and map all of them."""
    _tokenize({split.path: cache / split.name for split in missing}, encoder)
    return [_map(cache / split.name if split in missing else split.folder) for split in splits]


def _prune(folder: Path, stem: str, used: Collection[str]) -> None:
    """Remove all but a split's newest entries, and temporary folders of killed processes.

    An entry that this run uses stays: where the clock has been set back, it seems to be the oldest.
    """
    entries = _modification_times(path for path in folder.glob(f"{stem}-*") if path.name not in used)
    partials = _modification_times(folder.glob(f".{stem}-*.partial"))
    superseded = sorted(entries, key=entries.__getitem__, reverse=True)[RETAINED - 1 :]
    for path in superseded:
        shutil.rmtree(path, ignore_errors=True)
    for path in partials:
        if time.time() - partials[path] > ABANDONED:
            remove_unlocked(path)


def _modification_times(paths: Iterable[Path]) -> dict[Path, float]:
    """Return modification times in seconds, without paths that a concurrent run has removed."""
    times = {}
    for path in paths:
        with suppress(FileNotFoundError):
            times[path] = path.stat().st_mtime
    return times


def _is_cached(folder: Path) -> bool:
    """Return whether the cache has an intact entry, and remove a corrupt one.

    A missing entry may appear at any time, written by a concurrent run, and is never removed.
    """
    was_there = folder.is_dir()
    if _is_intact(folder):
        return True
    if was_there:
        shutil.rmtree(folder, ignore_errors=True)
    return False


def _is_intact(folder: Path) -> bool:
    refuse_link(folder.parent)
    refuse_link(folder)
    try:
        return folder.is_dir() and read_json(folder / MANIFEST) == hash_files(folder) and _is_consistent(_map(folder))
    except (LitLoraError, OSError, ValueError):
        return False


def hash_files(folder: Path) -> dict[str, str]:
    """Return the hashes of an entry's arrays, as its manifest holds them."""
    hashes = {}
    for name in (IDS, OFFSETS, FIRST_LABELS, ABOUT):
        with (folder / name).open("rb") as file:
            hashes[name] = digest(file)
    return hashes


def _map(folder: Path) -> Tokens:
    with (folder / IDS).open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    offsets = np.memmap(folder / OFFSETS, np.int64, "r")
    first_labels, about = np.memmap(folder / FIRST_LABELS, np.int32, "r"), np.memmap(folder / ABOUT, ABOUT_TYPE, "r")
    hashes = read_json(folder / MANIFEST)
    digest = sha256(f"{hashes.get(IDS)} {hashes.get(OFFSETS)}".encode()).hexdigest()
    return Tokens(np.frombuffer(memory, np.int32), offsets, first_labels, about, memory, digest)


def _is_consistent(tokens: Tokens) -> bool:
    """Return whether the arrays have the same examples, each with a token and with its first label inside."""
    offsets, firsts = tokens.offsets, tokens.first_labels
    if (
        len(offsets) != len(firsts) + 1
        or len(tokens.about) != len(firsts)
        or (offsets[0], offsets[-1]) != (0, len(tokens.ids))
    ):
        return False
    lengths = np.diff(offsets)
    return bool((lengths > 0).all() and (firsts >= 0).all() and (firsts < lengths).all()) and _are_facts(tokens)


def _are_facts(tokens: Tokens) -> bool:
    """Return whether what is stored of each sequence can be true of it."""
    about, inputs = tokens.about, np.diff(tokens.offsets) - 1
    lines, last, labels = about["line"], about["last_label"], about["labels"]
    has_label = labels > 0
    faults = (
        about["flags"] >> len(NAMES) != 0,
        lines < 1,
        np.diff(lines) < 0,
        (labels < 0) | (labels > inputs),
        np.where(has_label, (last < tokens.first_labels) | (last >= inputs), last != -1),
    )
    return not any(fault.any() for fault in faults)


@contextmanager
def _writable_cache(folder: Path) -> Iterator[Path]:
    """Yield the cache beside the data, or a temporary folder if it cannot be written.

    Files of the temporary folder are removed once they are mapped; their content stays until the run ends.
    """
    try:
        check_writable(folder, "--data_dir")
    except LitLoraError as error:
        log(f"{error}; the token cache is not saved, and the next run will tokenize again")
        with TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    try:
        yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()  # a refused split leaves no empty folder


def _tokenize(targets: Mapping[Path, Path], encoder: SplitEncoder) -> None:
    """Tokenize splits, the smallest first; their entries appear only once all rows of all of them are valid."""
    with ExitStack() as published:
        for path in sorted(targets, key=lambda path: path.stat().st_size):
            _write(published.enter_context(_new_entry(targets[path])), encoder.encode_file(path))


@contextmanager
def _new_entry(folder: Path) -> Iterator[Path]:
    """Yield a folder that becomes `folder`, unless a concurrent run has written the same entry meanwhile."""
    try:
        with atomic_directory(folder) as partial:
            yield partial
    except LitLoraError:
        if not folder.is_dir():
            raise


def _write(folder: Path, chunks: Iterable[Tokens]) -> None:
    """Write tokens chunk by chunk, and then the manifest."""
    end = 0
    with ExitStack() as stack:
        ids, offsets, first_labels, about = (
            stack.enter_context((folder / name).open("wb")) for name in (IDS, OFFSETS, FIRST_LABELS, ABOUT)
        )
        offsets.write(np.zeros(1, np.int64).tobytes())
        for chunk in chunks:
            ids.write(chunk.ids.tobytes())
            offsets.write((chunk.offsets[1:] + end).tobytes())
            first_labels.write(chunk.first_labels.tobytes())
            about.write(chunk.about.tobytes())
            end += len(chunk.ids)
    (folder / MANIFEST).write_text(json.dumps(hash_files(folder)), encoding="utf-8")
