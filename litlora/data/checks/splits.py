"""Checks of whole splits, and of what they have in common."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from litlora.data.checks.findings import Check, Finding, Severity, finding_of
from litlora.data.checks.rows import FLAGGED
from litlora.data.tokens import Tokens
from litlora.errors import LitLoraError

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE


class CheckedSplit(NamedTuple):
    """A split as its checks see it."""

    path: Path
    tokens: Tokens

    def at(self, index: int) -> str:
        """Return the location of a sequence."""
        return f"{self.path} line {self.tokens.about['line'][index]}"


class CheckedData(NamedTuple):
    """All that the checks of whole splits look at."""

    splits: Sequence[CheckedSplit]
    limit: int
    """The maximum number of tokens of a sequence."""
    embedding: int | None
    """The number of rows of the model's embedding."""
    vocabulary: int | None = None
    """The number of tokens of the tokenizer."""


SplitCheck = Callable[[CheckedData], Iterable[Finding]]


def _of_sequences(data: CheckedData, masks: Sequence[NDArray[np.bool_]], check: Check[Any]) -> Iterator[Finding]:
    """Yield a finding that counts the rows of these sequences, if there are any."""
    counts = [len(np.unique(s.tokens.about["line"][mask])) for s, mask in zip(data.splits, masks, strict=True)]
    firsts = [s.at(int(mask.argmax())) for s, mask in zip(data.splits, masks, strict=True) if mask.any()]
    if firsts:
        yield finding_of(check, sum(counts), firsts[0])


def find_flagged(data: CheckedData) -> Iterator[Finding]:
    """Yield what the checks of rows and of sequences have found when the split was tokenized."""
    for bit, check in enumerate(FLAGGED):
        masks = [(split.tokens.about["flags"] >> bit & 1).astype(bool) for split in data.splits]
        yield from _of_sequences(data, masks, check)


def _of_mask(
    split: CheckedSplit, mask: NDArray[np.bool_], name: str, severity: Severity, description: str, consequence: str
) -> Iterator[Finding]:
    """Yield a finding of the rows of a split with sequences that a mask marks, if there are any."""
    if mask.any():
        rows = len(np.unique(split.tokens.about["line"][mask]))
        yield Finding(name, severity, rows, split.at(int(mask.argmax())), description, consequence)


def find_unsupervised(data: CheckedData) -> Iterator[Finding]:
    """Find sequences without a supervised token, which are dropped; an error where no other is left."""
    for split in data.splits:
        mask = split.tokens.about["labels"] == 0
        severity, consequence = (ERROR, "there is nothing to learn") if mask.all() else (WARNING, "they are dropped")
        yield from _of_mask(split, mask, "no_label", severity, "without a supervised token", consequence)


def find_truncated(data: CheckedData) -> Iterator[Finding]:
    """Find sequences that are longer than the limit: cut in the response, at its end, or before it."""
    for split in data.splits:
        about, first = split.tokens.about, split.tokens.first_labels
        lengths = np.diff(split.tokens.offsets) - 1
        last, supervised = about["last_label"], about["labels"] > 0
        lost = supervised & (first >= data.limit)
        cut = supervised & ~lost & (last >= data.limit)
        end = cut & (last == data.limit)
        kept = length_of_most(lengths)
        limit = f"--train.max_seq_length ({data.limit:,})"
        hint = f"{kept:,} would leave 99 % of the rows whole"
        for name, mask, what in (
            ("response_lost", lost, f"dropped, since their response begins behind {limit}"),
            ("response_cut", cut & ~end, f"whose response is cut by {limit}, its end token lost"),
            ("end_cut", end, f"whose end token is cut by {limit}"),
        ):
            yield from _of_mask(split, mask, name, WARNING, what, hint)


def length_of_most(lengths: NDArray[np.int64]) -> int:
    """Return the length limit that leaves 99 % of the sequences whole."""
    return int(np.quantile(lengths, 0.99, method="inverted_cdf"))


def find_duplicates(data: CheckedData) -> Iterator[Finding]:
    """Find rows that repeat an earlier one of their split, exactly or up to case and punctuation."""
    for split in data.splits:
        exact, similar = (_repeated(split.tokens.about[name]) for name in ("same", "similar"))
        for name, mask, what in (
            ("duplicate", exact, "repeating an earlier row"),
            ("near_duplicate", similar & ~exact, "repeating an earlier row up to case and punctuation"),
        ):
            consequence = "they count several times: prepare the data without them"
            yield from _of_mask(split, mask, name, NOTE, what, consequence)


def _repeated(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Tell which hashes occur earlier; 0 is none."""
    _, firsts = np.unique(hashes, return_index=True)
    repeated: NDArray[np.bool_] = hashes != 0
    repeated[firsts] = False
    return repeated


def find_leaks(data: CheckedData) -> Iterator[Finding]:
    """Find rows of the validation split that are in the training split as well."""
    if len(data.splits) < 2:
        return
    train, val = data.splits
    exact, similar = (
        np.isin(val.tokens.about[name], train.tokens.about[name]) & (val.tokens.about[name] != 0)
        for name in ("same", "similar")
    )
    for name, mask, what in (
        ("leak", exact, f"found in {train.path.name} as well"),
        ("near_leak", similar & ~exact, f"found in {train.path.name} as well, up to case and punctuation"),
    ):
        consequence = "the validation loss is too good: prepare the data without duplicates"
        yield from _of_mask(val, mask, name, WARNING, what, consequence)


def find_unknown_ids(data: CheckedData) -> Iterator[Finding]:
    """Find tokens that the model's embedding does not have, which only a larger vocabulary can give."""
    if data.embedding is None:
        return
    surplus = (data.vocabulary or 0) - data.embedding
    found = [split for split in data.splits if split.tokens.max_id() >= data.embedding]
    for split in found:
        index, count = split.tokens.rows_with_ids_from(data.embedding)
        what = f"with token ids that the model does not have (its vocabulary ends at {data.embedding:,})"
        hint = "use tokenizer files and weights of the same model"
        yield Finding("vocabulary", ERROR, count, split.at(index), what, hint)
    if surplus > 0 and not found:
        what = f"the tokenizer has {surplus:,} more tokens than the model's embedding has rows ({data.embedding:,})"
        yield Finding("vocabulary", NOTE, surplus, "", what, "no row of the data has one of them")


SPLIT_CHECKS: tuple[SplitCheck, ...] = (
    find_unknown_ids, find_unsupervised, find_truncated, find_flagged, find_leaks, find_duplicates,
)  # fmt: skip


def run_checks(data: CheckedData) -> list[Finding]:
    """Return the findings of all checks, the worst first."""
    order = list(Severity)
    findings = [finding for check in SPLIT_CHECKS for finding in check(data)]
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def refuse_errors(findings: Sequence[Finding]) -> None:
    """Refuse data with an error among the findings, and count the others."""
    errors = [finding for finding in findings if finding.severity is ERROR]
    if errors:
        more = f" (and {len(errors) - 1} more errors)" if len(errors) > 1 else ""
        raise LitLoraError(f"{errors[0].sentence}{more}")
