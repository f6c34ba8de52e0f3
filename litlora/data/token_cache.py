"""The token cache: the ids of a data folder's splits, encoded once in parallel and memory-mapped."""

import json
import mmap
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from litlora.data.encoding import PIECE, Tokens, encode
from litlora.data.examples import ANY, Example, Turn, open_split, read_rows, require_rows
from litlora.data.readers import jsonl_rows, jsonl_start
from litlora.data.tokenizer import Tokenizer
from litlora.errors import LitLoraError
from litlora.utils.files import atomic_directory, check_writable, digest, read_json
from litlora.utils.processes import exit_with_parent, usable_cores

FOLDER = "tokenized"
FORMAT = 1  # another number for other tokens of the same examples, or for other files
IDS, OFFSETS, FIRST_LABELS, MANIFEST = "ids.int32", "offsets.int64", "first_labels.int32", "manifest.json"
SMALL = 8_000_000  # bytes that are done before other processes have started
TEXTS = 512  # that are encoded at one time
MOST_PROCESSES = 16
ORPHANED = 24 * 3600  # seconds after which no process is still at work on tokens
KEPT = 4  # of each split, beside the data: for other tokenizers, prompt styles and rows


class Job(NamedTuple):
    """Lines of a split: its bytes from start to end."""

    path: Path
    start: int
    end: int
    only_check: bool


class Piece(NamedTuple):
    """What the lines of a job hold."""

    size: int
    lines: int
    rows: int
    bad: list[tuple[int, str]]
    """Those of the lines that are no row, counted from 1, and why."""
    tokens: list[Tokens]


@dataclass(frozen=True)
class SplitEncoder:
    """All that decides which tokens come out of a split, beside the split itself."""

    tokenizer: Tokenizer
    prompt_style: str
    mask_prompt: bool

    def key(self, path: Path) -> str:
        """Return a name that is another for every other content of the split and for every other encoder."""
        style = self.tokenizer.prompt_style(self.prompt_style)
        turns = Turn("question", "answer"), Turn("question", "answer", "input")
        looks = [repr(style.render(Example((turn,)))) for turn in turns]  # a template may also write the date
        with open_split(path) as file:
            content = digest(file)
        parts = [FORMAT, content, self.tokenizer.fingerprint, self.prompt_style, looks, self.mask_prompt]
        return sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def read(self, job: Job) -> Piece:
        """Read lines of a split and turn their examples into tokens, if all of them are rows."""
        with job.path.open("rb") as file:
            file.seek(job.start)
            lines = file.read(job.end - job.start).splitlines()
        readings, bad = read_rows(jsonl_rows(lines), ANY)
        examples = [] if bad or job.only_check else [reading.example for _, reading in readings]
        style = self.tokenizer.prompt_style(self.prompt_style)
        groups = [examples[start : start + TEXTS] for start in range(0, len(examples), TEXTS)]
        tokens = [encode(group, self.tokenizer, style, mask_prompt=self.mask_prompt) for group in groups]
        return Piece(
            job.end - job.start, len(lines), len(readings), [(line, str(error)) for line, error in bad], tokens
        )


class Split(NamedTuple):
    """A split of a data folder, and the name of the folder that has its tokens."""

    path: Path
    name: str

    @property
    def folder(self) -> Path:
        return self.path.parent / FOLDER / self.name


def find_split(path: Path, encoder: SplitEncoder) -> Split:
    """Find out by what name the tokens of a split go, or say how to prepare the split."""
    return Split(path, f"{path.stem}-{encoder.key(path)}")


def open_splits(splits: Sequence[Split], encoder: SplitEncoder) -> list[Tokens]:
    """Return the tokens of splits of one data folder, made now where no earlier run has left them beside it."""
    missing = [split for split in splits if not _has_tokens(split.folder)]
    if not missing:
        return [_map(split.folder) for split in splits]
    with _home(splits[0].folder.parent) as home:
        _make({split.path: home / split.name for split in missing}, encoder)
        for split in missing:
            _prune(home, split.path.stem)
        return [_map(home / split.name if split in missing else split.folder) for split in splits]


def _prune(folder: Path, stem: str) -> None:
    """Remove the tokens of a split that are older than the newest few, and what killed processes left of others."""
    made = _modified(folder.glob(f"{stem}-*"))
    partials = _modified(folder.glob(f".{stem}-*.partial"))
    superseded = sorted(made, key=made.__getitem__, reverse=True)[KEPT:]
    orphans = [path for path in partials if time.time() - partials[path] > ORPHANED]
    for old in (*superseded, *orphans):
        shutil.rmtree(old, ignore_errors=True)


def _modified(paths: Iterable[Path]) -> dict[Path, float]:
    """Return when paths were modified, in seconds, but for those that another run has removed meanwhile."""
    times = {}
    for path in paths:
        with suppress(FileNotFoundError):
            times[path] = path.stat().st_mtime
    return times


def _has_tokens(folder: Path) -> bool:
    """Say whether a folder of tokens is there, and remove one that is damaged.

    One that is not there may appear at any time, by another run, and is never removed.
    """
    if not folder.is_dir():
        return False
    try:
        is_whole = read_json(folder / MANIFEST) == _digests(folder) and _fit_together(_map(folder))
    except (LitLoraError, OSError, ValueError):
        is_whole = False
    if not is_whole:
        shutil.rmtree(folder, ignore_errors=True)
    return is_whole


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for name in (IDS, OFFSETS, FIRST_LABELS):
        with (folder / name).open("rb") as file:
            digests[name] = digest(file)
    return digests


def _map(folder: Path) -> Tokens:
    with (folder / IDS).open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    offsets = np.memmap(folder / OFFSETS, np.int64, "r")
    return Tokens(np.frombuffer(memory, np.int32), offsets, np.memmap(folder / FIRST_LABELS, np.int32, "r"), memory)


def _fit_together(tokens: Tokens) -> bool:
    """Say whether the arrays are those of the same examples, each with a token and its first label inside."""
    offsets, firsts = tokens.offsets, tokens.first_labels
    if len(offsets) != len(firsts) + 1 or (offsets[0], offsets[-1]) != (0, len(tokens.ids)):
        return False
    lengths = np.diff(offsets)
    return bool((lengths > 0).all() and (firsts >= 0).all() and (firsts < lengths).all())


@contextmanager
def _home(folder: Path) -> Iterator[Path]:
    """Lend the folder for tokens beside the data, or, where that cannot be written, one that vanishes.

    The files of the latter are gone as soon as they are mapped, which keeps their content for this run.
    """
    try:
        check_writable(folder, "--data_dir")
    except LitLoraError as error:
        sys.stderr.write(f"{error}; its tokens are made again at each start\n")
        with TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    try:
        yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()  # a refused split leaves nothing behind


def _make(targets: Mapping[Path, Path], encoder: SplitEncoder) -> None:
    """Tokenize splits, the smaller first, into folders that appear only when all rows of all of them are right."""
    with ExitStack() as published:
        for path in sorted(targets, key=lambda path: path.stat().st_size):
            _write(published.enter_context(_unless_another_is_first(targets[path])), _read(path, encoder))


@contextmanager
def _unless_another_is_first(folder: Path) -> Iterator[Path]:
    """Lend a folder that becomes `folder`, unless another run has made the same tokens meanwhile."""
    try:
        with atomic_directory(folder) as partial:
            yield partial
    except LitLoraError:
        if not folder.is_dir():
            raise


def _write(folder: Path, pieces: Iterable[Tokens]) -> None:
    """Write tokens piece by piece, and last the manifest that says that they are whole."""
    end = 0
    with ExitStack() as stack:
        ids, offsets, first_labels = (
            stack.enter_context((folder / name).open("wb")) for name in (IDS, OFFSETS, FIRST_LABELS)
        )
        offsets.write(np.zeros(1, np.int64).tobytes())
        for piece in pieces:
            ids.write(piece.ids.tobytes())
            offsets.write((piece.offsets[1:] + end).tobytes())
            first_labels.write(piece.first_labels.tobytes())
            end += len(piece.ids)
    (folder / MANIFEST).write_text(json.dumps(_digests(folder)), encoding="utf-8")


def _read(path: Path, encoder: SplitEncoder) -> Iterator[Tokens]:
    """Yield the tokens of a split piece by piece; once a row is wrong, only go on to count the wrong ones."""
    lines = rows = 0
    bad: list[str] = []
    size = path.stat().st_size
    jobs = (Job(path, *span, only_check=bool(bad)) for span in _spans(path))
    with tqdm(desc=f"tokenizing {path.name}", total=size, unit="B", unit_scale=True, delay=2) as bar:
        for piece in _run(jobs, encoder, _processes(size)):
            bad += [f"{path} line {lines + line}: {fault}" for line, fault in piece.bad]
            lines, rows = lines + piece.lines, rows + piece.rows
            if not bad:
                yield from piece.tokens
            bar.update(piece.size)
    require_rows(str(path), rows, bad, ANY)


def _spans(path: Path) -> Iterator[tuple[int, int]]:
    """Split a file into pieces of whole lines."""
    size = path.stat().st_size
    with path.open("rb") as file:
        end = jsonl_start(file)
        while end < size:
            start = end
            file.seek(start + PIECE)
            file.readline()
            end = min(file.tell(), size)
            yield start, end


def _processes(size: int) -> int:
    """Choose how many processes are to tokenize so many bytes."""
    return 1 if size < SMALL else min(usable_cores(), MOST_PROCESSES)


def _run(jobs: Iterable[Job], encoder: SplitEncoder, processes: int) -> Iterator[Piece]:
    """Do the jobs, in parallel where that is wanted, and yield their pieces in order."""
    if processes == 1:
        yield from map(encoder.read, jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the threads that torch has
    pool = ProcessPoolExecutor(processes, context, _start_worker, (encoder,))
    try:
        yield from _in_order(pool, jobs, waiting=2 * processes)
    except BrokenProcessPool as error:
        raise LitLoraError("a process that tokenizes was killed; was there too little memory? Start again") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, jobs: Iterable[Job], waiting: int) -> Iterator[Piece]:
    """Keep as many jobs waiting as keep the processes busy, so that memory holds few pieces."""
    futures: deque[Future[Piece]] = deque()
    for job in jobs:
        futures.append(pool.submit(_read_in_worker, job))
        if len(futures) > waiting:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


_worker: dict[str, SplitEncoder] = {}  # what a process that tokenizes was started with


def _start_worker(encoder: SplitEncoder) -> None:
    """Make this a process that tokenizes: on one core, until its parent ends it or is gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    Thread(target=exit_with_parent, daemon=True).start()
    _worker["encoder"] = encoder


def _read_in_worker(job: Job) -> Piece:
    return _worker["encoder"].read(job)
