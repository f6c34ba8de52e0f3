"""Tokenizing a split chunk by chunk, in worker processes if it is large."""

import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from litlora.data.checks.rows import NAMES, flags_of_row
from litlora.data.dataset import Invalid, open_split, read_rows, require_rows
from litlora.data.duplicates import digests
from litlora.data.encoding import RenderedRow, encode_rows
from litlora.data.prompts.chat_style import ChatStyle
from litlora.data.prompts.styles import PromptStyle, StyleSettings
from litlora.data.readers.parsers import jsonl_rows, jsonl_start
from litlora.data.readers.raw_files import MAX_ROW
from litlora.data.readers.row_formats import ANY, ParsedRow
from litlora.data.tokenizer import Tokenizer
from litlora.data.tokens import Tokens
from litlora.errors import LitLoraError
from litlora.utils.files import digest
from litlora.utils.processes import exit_with_parent, usable_cores
from litlora.utils.progress import task

FORMAT = 2  # to be increased when the tokens of an example or the files of the cache change
CHUNK = 4_000_000  # bytes of a split that a worker reads at once
SINGLE_PROCESS = 8_000_000  # bytes up to which one process is done before workers have started
TEXTS = 512  # that are tokenized in one call
MAX_PROCESSES = 16


class LineRange(NamedTuple):
    """Lines of a split: its bytes from start to end."""

    path: Path
    start: int
    end: int
    only_check: bool
    """Count invalid rows without tokenizing the others."""


class EncodedLines(NamedTuple):
    """The rows and tokens of a range of lines."""

    size: int
    lines: int
    rows: int
    invalid: list[tuple[int, str]]
    """Number, counted from 1, and error of the lines that are not valid rows."""
    refused: list[tuple[int, str]]
    """Number and error of the lines that the prompt style cannot render."""
    tokens: list[Tokens]


@dataclass(frozen=True)
class SplitEncoder:
    """All that decides which tokens a split becomes, except for the split itself."""

    tokenizer: Tokenizer
    prompt_style: StyleSettings
    mask_prompt: bool

    def key(self, content: str) -> str:
        """Return a hash of these settings and of a split's content, whose hash is given."""
        style = [self.prompt_style.name, dict(self.prompt_style.variables), self.date]
        values = [FORMAT, content, self.tokenizer.fingerprint, style, self.mask_prompt, NAMES]
        return sha256(json.dumps(values).encode()).hexdigest()[:16]

    @property
    def date(self) -> str | None:
        """The day that the chat template writes as today's, if it does."""
        style = self.tokenizer.prompt_style(self.prompt_style)
        return self.prompt_style.date if isinstance(style, ChatStyle) and style.template.reads_date else None

    def encode_file(self, path: Path) -> Iterator[Tokens]:
        """Yield the tokens of a split chunk by chunk; after the first invalid row, only count the others."""
        size = path.stat().st_size
        return self._collect(path, size, worker_processes(size))

    def _collect(self, path: Path, size: int, processes: int) -> Iterator[Tokens]:
        lines = rows = 0
        invalid, refused = Invalid(), Invalid()
        ranges = (LineRange(path, *s, only_check=bool(invalid.count or refused.count)) for s in chunk_spans(path))
        with task(f"tokenizing {path.name}", size, "B") as progress:
            for chunk in _encode_ranges(ranges, self, processes):
                for faults, found in ((invalid, chunk.invalid), (refused, chunk.refused)):
                    for line, error in found:
                        faults.add(f"{path} line {lines + line}", error)
                if not invalid.count and not refused.count:
                    yield from (tokens.with_lines_from(lines) for tokens in chunk.tokens)
                lines, rows = lines + chunk.lines, rows + chunk.rows
                progress.advance(chunk.size)
        require_rows(str(path), rows, invalid, ANY)
        if refused.count:
            more = f" (rows after it: {refused.count - 1:,})" if refused.count > 1 else ""
            raise LitLoraError(f"{refused.first}{more}")

    def encode_range(self, lines: LineRange) -> EncodedLines:
        """Read a range of lines and tokenize their examples, if all rows are valid."""
        with lines.path.open("rb") as file:
            file.seek(lines.start)
            content = file.read(lines.end - lines.start).splitlines()
        rows, invalid = read_rows(jsonl_rows(content), ANY)
        errors = [(line, str(error)) for line, error in invalid]
        rendered, refused = self._render([] if invalid or lines.only_check else rows)
        tokens = [] if refused else self._encode(rendered)
        return EncodedLines(lines.end - lines.start, len(content), len(rows), errors, refused, tokens)

    def _render(self, rows: Sequence[tuple[int, ParsedRow]]) -> tuple[list[RenderedRow], list[tuple[int, str]]]:
        """Return the sequences of rows, and line and error of the rows that the style cannot render."""
        style = self.tokenizer.prompt_style(self.prompt_style)
        rendered: list[RenderedRow] = []
        refused = []
        for line, row in rows:
            try:
                rendered += _sequences(row, line, style)
            except LitLoraError as error:
                refused.append((line, str(error)))
        return rendered, refused

    def _encode(self, rows: Sequence[RenderedRow]) -> list[Tokens]:
        style = self.tokenizer.prompt_style(self.prompt_style)
        groups = [rows[start : start + TEXTS] for start in range(0, len(rows), TEXTS)]
        return [encode_rows(group, self.tokenizer, style, mask_prompt=self.mask_prompt) for group in groups]


def content_of(split: Path) -> str:
    """Return the hash of a split's content."""
    with open_split(split) as file:
        return digest(file)


def _sequences(row: ParsedRow, line: int, style: PromptStyle) -> list[RenderedRow]:
    """Return the sequences of a row; the first one holds what the checks know about the row."""
    first, *others = (RenderedRow(each, line) for each in style.render(row.example))
    same, similar = digests(row.example)
    return [first._replace(flags=flags_of_row(row), same=same, similar=similar), *others]


def chunk_spans(path: Path) -> Iterator[tuple[int, int]]:
    """Yield start and end of chunks of a file, each of which ends with a line."""
    size = path.stat().st_size
    with path.open("rb") as file:
        end = jsonl_start(file)
        while end < size:
            start = end
            file.seek(start + CHUNK)
            if len(file.readline(MAX_ROW)) == MAX_ROW:
                raise LitLoraError(f"{path} has a line of more than {MAX_ROW >> 20} MB behind byte {start + CHUNK:,}")
            end = min(file.tell(), size)
            yield start, end


def worker_processes(size: int) -> int:
    """Return how many processes tokenize a split of `size` bytes."""
    return 1 if size < SINGLE_PROCESS else min(usable_cores(), MAX_PROCESSES)


def _encode_ranges(ranges: Iterable[LineRange], encoder: SplitEncoder, processes: int) -> Iterator[EncodedLines]:
    """Yield the encoded ranges in order."""
    if processes == 1:
        yield from map(encoder.encode_range, ranges)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
    pool = ProcessPoolExecutor(processes, context, _start_worker, (encoder,))
    try:
        yield from _in_order(pool, ranges, max_pending=2 * processes)
    except BrokenProcessPool as error:
        hint = "free some memory and run the same command again"
        raise LitLoraError(f"a tokenizing process was killed, probably for lack of memory; {hint}") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, ranges: Iterable[LineRange], max_pending: int) -> Iterator[EncodedLines]:
    """Submit as many ranges as keep the workers busy, so that few results are in memory."""
    futures: deque[Future[EncodedLines]] = deque()
    for lines in ranges:
        futures.append(pool.submit(_encode_in_worker, lines))
        if len(futures) > max_pending:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


_worker: dict[str, SplitEncoder] = {}  # the encoder that this worker process was started with


def _start_worker(encoder: SplitEncoder) -> None:
    """Set up a worker process: one core, and an end with its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    Thread(target=exit_with_parent, daemon=True).start()
    _worker["encoder"] = encoder


def _encode_in_worker(lines: LineRange) -> EncodedLines:
    return _worker["encoder"].encode_range(lines)
