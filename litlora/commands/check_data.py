"""check_data: what is wrong with prepared data, and what a model would learn from it, without training."""

import os
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from litlora.args.data import CheckDataArgs
from litlora.data.checks import CheckedData, CheckedSplit, Severity, length_of_most, run_checks
from litlora.data.dataset import choose_prompt_style
from litlora.data.prompt_styles import StyleSettings
from litlora.data.split_encoder import SplitEncoder
from litlora.data.token_cache import find_split, peek_splits
from litlora.data.tokenizer import Tokenizer
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
    output("\n".join(map(str, findings)) or "no findings")
    for index in range(min(args.show, len(splits[0].tokens.about))):
        output(_shown(splits[0], index, tokenizer, in_cells=args.tokens))
    refused = [f for f in findings if f.severity is Severity.ERROR or (args.strict and f.severity is Severity.WARNING)]
    if refused:
        what = "errors or warnings" if args.strict else "errors"
        raise LitLoraError(f"the data in {args.data_dir} has {len(refused)} {what}: see the findings above")


def _lengths(split: CheckedSplit, limit: int) -> Iterator[str]:
    """Yield a summary of a split, and a histogram of its lengths in tokens."""
    about, lengths = split.tokens.about, np.diff(split.tokens.offsets)
    rows, supervised = len(np.unique(about["line"])), int(about["labels"].sum())
    counted = f"{rows:,} rows, {len(lengths):,} sequences, {lengths.sum():,} tokens"
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
    lengths = np.diff(split.tokens.offsets) - 1
    longer = np.flatnonzero(lengths > limit)
    for index in longer[:CUT_ROWS]:
        fate = "dropped" if split.tokens.first_labels[index] >= limit else "cut"
        yield f"  {split.at(int(index))}: {lengths[index]:,} tokens, {fate} at {limit:,}"
    if len(longer) > CUT_ROWS:
        yield f"  and {len(longer) - CUT_ROWS:,} more"


def _shown(split: CheckedSplit, index: int, tokenizer: Tokenizer, *, in_cells: bool) -> str:
    """Return a sequence as it is learned: supervised tokens in colour, or else between brackets."""
    tokens = split.tokens
    stored = tokens.ids[int(tokens.offsets[index]) : int(tokens.offsets[index + 1])]
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    parts = [_marked(_text(ids, tokenizer, in_cells), learned, colour) for ids, learned in _runs(stored)]
    title = f"--- {split.at(index)}: {len(stored):,} tokens, {int(tokens.about['labels'][index]):,} supervised"
    return f"{title}\n{''.join(parts)}"


def _runs(stored: NDArray[np.int32]) -> Iterator[tuple[list[int], bool]]:
    """Yield runs of ids that are all supervised, or all not."""
    for run in np.split(stored, np.flatnonzero(np.diff(stored >= 0)) + 1):
        yield np.where(run < 0, ~run, run).tolist(), bool(run[0] >= 0)


def _text(ids: Sequence[int], tokenizer: Tokenizer, in_cells: bool) -> str:
    if in_cells:
        return "".join(f"│{printable(tokenizer.visible([i]))}" for i in ids) + "│"
    return "\n".join(map(printable, tokenizer.visible(ids).split("\n")))


def _marked(text: str, learned: bool, colour: bool) -> str:
    if not learned:
        return text
    return f"{LEARNED}{text}{RESET}" if colour else f"[[{text}]]"
