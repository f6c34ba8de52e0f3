"""check_data: what is wrong with prepared data, and what a model would learn from it, without training."""

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from textwrap import fill

import numpy as np
from numpy.typing import NDArray

from litlora.args.data import CheckDataArgs
from litlora.data.checks.findings import Finding, Severity
from litlora.data.checks.splits import CheckedData, CheckedSplit, length_of_most, run_checks
from litlora.data.dataset import choose_prompt_style
from litlora.data.prompts.styles import StyleSettings
from litlora.data.split_encoder import SplitEncoder
from litlora.data.token_cache import find_split, peek_splits
from litlora.data.tokenizer import Tokenizer
from litlora.data.tokens import Tokens
from litlora.data.transformers_ids import find_other_ids
from litlora.errors import LitLoraError
from litlora.models.checkpoint_files import read_config
from litlora.utils.console import output, printable

CUT_ROWS = 10  # that are listed with their lengths
BAR = 40  # characters of the longest bar
LEARNED, RESET = "\x1b[1;32m", "\x1b[0m"  # bold green, on dark and light terminals


def check_data(args: CheckDataArgs) -> None:
    """Print findings about the data, the lengths of its rows, and some of them as they are learned."""
    _, config = read_config(args.checkpoint_dir)
    tokenizer = Tokenizer(args.checkpoint_dir)
    train = args.data_dir / "train.jsonl"
    name, reason = choose_prompt_style(args.prompt_style, train, tokenizer.chat_template)
    today = datetime.now().date().isoformat()
    encoder = SplitEncoder(tokenizer, StyleSettings(name, args.prompt_style_variables or {}, today), args.mask_prompt)
    found = [find_split(args.data_dir / f"{split}.jsonl", encoder) for split in ("train", "val")]
    opened = peek_splits(found, encoder)
    splits = [CheckedSplit(split.path, tokens) for split, tokens in zip(found, opened, strict=True)]
    data = CheckedData(splits, args.max_seq_length or config.positions, config.vocab_size, tokenizer.vocab_size)
    output(f"prompt style: {name} ({reason})")
    for split in splits:
        output("\n".join([*_lengths(split, data.limit), *_cut_rows(split, data.limit)]))
    findings = [*run_checks(data), *find_other_ids(args.checkpoint_dir, encoder, [split.path for split in splits])]
    output("\n".join(map(_line, findings)) or "no findings")
    for text in _shown(data, args.show, tokenizer, in_cells=args.tokens):
        output(text)
    refused = [f for f in findings if f.severity is Severity.ERROR or (args.strict and f.severity is Severity.WARNING)]
    if refused:
        what = "errors or warnings" if args.strict else "errors"
        raise LitLoraError(f"the data in {args.data_dir} has {len(refused)} {what}: see the findings above")


def _line(finding: Finding) -> str:
    """Return a finding as one line, which on a terminal is broken between words and not within them."""
    if not sys.stdout.isatty():
        return str(finding)
    width = shutil.get_terminal_size().columns - 1
    return fill(str(finding), width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _lengths(split: CheckedSplit, limit: int) -> Iterator[str]:
    """Yield a summary of a split, and a histogram of its lengths in tokens."""
    about, lengths = split.tokens.about, np.diff(split.tokens.offsets)
    rows, supervised = len(np.unique(about["line"])), int(about["labels"].sum())
    many = f"{rows:,} row{'' if rows == 1 else 's'}"
    if len(lengths) > rows:
        many += f" as {len(lengths):,} sequences"
    counted = f"{many}, {lengths.sum():,} tokens"
    yield f"{split.path}: {counted}, {supervised:,} supervised"
    edges = [0, *(2**power for power in range(3, int(lengths.max()).bit_length() + 1))]
    counts, _ = np.histogram(lengths, edges)
    for low, high, number in zip(edges, edges[1:], counts, strict=False):
        if number:
            bar = "#" * max(1, round(BAR * number / counts.max()))
            mark = f" > {limit:,}" if low > limit else ""
            yield f"  {low:>6,} to {high - 1:>6,} {number:>9,} {bar}{mark}"
    most = length_of_most(lengths - 1)
    yield f"  99 % are whole with a --train.max_seq_length of {most:,}; here it is {limit:,}"


def _cut_rows(split: CheckedSplit, limit: int) -> Iterator[str]:
    """Yield the rows that are longer than the limit, and whether they are dropped."""
    lengths = np.diff(split.tokens.offsets)
    longer = np.flatnonzero(lengths - 1 > limit)  # the last token is a label only
    for index in longer[:CUT_ROWS]:
        fate = "dropped" if split.tokens.first_labels[index] >= limit else "cut"
        yield f"  {split.at(int(index))}: {lengths[index]:,} tokens, {fate} at {limit:,}"
    if len(longer) > CUT_ROWS:
        yield f"  and {len(longer) - CUT_ROWS:,} more"


def _shown(data: CheckedData, rows: int, tokenizer: Tokenizer, *, in_cells: bool) -> Iterator[str]:
    """Yield the sequences of the first rows as they are learned: supervised tokens in colour, or else in brackets."""
    split = data.splits[0]
    lines = split.tokens.about["line"]
    for line in np.unique(lines)[:rows]:
        first, end = np.searchsorted(lines, [line, line + 1])  # sequences are in the order of their lines
        for number, index in enumerate(range(first, end), start=1):
            which = f" (sequence {number} of {end - first})" if end - first > 1 else ""
            yield f"\n--- {split.at(index)}{which}: {_counts(split.tokens, index)}"
            yield _as_learned(split.tokens, index, data.limit, tokenizer, in_cells)


def _counts(tokens: Tokens, index: int) -> str:
    length, labels = int(tokens.offsets[index + 1] - tokens.offsets[index]), int(tokens.about["labels"][index])
    return f"{length:,} tokens, {labels:,} supervised"


def _as_learned(tokens: Tokens, index: int, limit: int, tokenizer: Tokenizer, in_cells: bool) -> str:
    """Return the text of a sequence up to the limit, whose supervised tokens are marked."""
    stored = tokens.ids[int(tokens.offsets[index]) : int(tokens.offsets[index + 1])]
    learned = stored[: limit + 1]  # the last token is a label only
    runs = _runs(learned)
    text = _cells(runs, tokenizer) if in_cells else "".join(_marked(_text(ids, tokenizer), on) for ids, on in runs)
    cut = len(stored) - len(learned)
    return f"{text}\n--- {cut:,} more tokens are cut" if cut else text


def _runs(stored: NDArray[np.int32]) -> Iterator[tuple[list[int], bool]]:
    """Yield runs of ids that are all supervised, or all not."""
    for run in np.split(stored, np.flatnonzero(np.diff(stored >= 0)) + 1):
        yield np.where(run < 0, ~run, run).tolist(), bool(run[0] >= 0)


def _text(ids: Sequence[int], tokenizer: Tokenizer, line_break: str = "\n") -> str:
    return line_break.join(map(printable, tokenizer.visible(ids).split("\n")))


def _cells(runs: Iterable[tuple[list[int], bool]], tokenizer: Tokenizer) -> str:
    """Return a token in each cell, in lines that fit the terminal and break between cells."""
    width, column, parts = shutil.get_terminal_size().columns, 0, []
    for ids, learned in runs:
        cells = ["│" + _text([token_id], tokenizer, line_break=r"\n") for token_id in ids]
        if learned and not _has_colour():
            cells[0], cells[-1] = f"[[{cells[0]}", f"{cells[-1]}│]]"
        for cell in cells:
            if column and column + _width(cell) >= width:  # one is left for the bar at the end
                parts.append("\n")
                column = 0
            parts.append(_coloured(cell) if learned else cell)
            column += _width(cell)
    return "".join(parts) + ("" if parts[-1].endswith("]]") else "│")


def _width(text: str) -> int:
    """Return how many columns a text takes."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _has_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _marked(text: str, learned: bool) -> str:
    if not learned:
        return text
    return _coloured(text) if _has_colour() else f"[[{text}]]"


def _coloured(text: str) -> str:
    """Colour each line by itself on a terminal: a pager may show it alone."""
    if not _has_colour():
        return text
    return "\n".join(f"{LEARNED}{line}{RESET}" if line else "" for line in text.split("\n"))
