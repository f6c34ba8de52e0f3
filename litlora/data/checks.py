"""Checks of the data: findings about rows that are valid, but may teach something else than intended.

A check is one function; a new check is a new entry of a table. ROW_CHECKS look at a row as it was read, SEQUENCE_CHECKS
at a rendered and tokenized sequence; what they find is stored with the tokens, a bit each. SPLIT_CHECKS look at splits.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from litlora.data.examples import Example
from litlora.data.prompts.rendered import NO_END, REASONING_LOST, SYSTEM_MOVED, TOOLS_LOST, Rendered
from litlora.data.readers.row_formats import ParsedRow
from litlora.data.tokens import Tokens
from litlora.errors import LitLoraError

REPEATED = 30  # characters of a question with which an answer begins that repeats it
REPLACEMENT = "\ufffd"  # what decoding puts in place of bytes that are no character
Subject = TypeVar("Subject")


class Severity(StrEnum):
    """Whether a finding stops a run, may spoil it, or is only to be known."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """Rows with something in common, and what it means for training."""

    check: str
    severity: Severity
    count: int
    first: str
    """The location of the first row; empty if the finding is not about rows."""
    description: str
    consequence: str

    @property
    def sentence(self) -> str:
        """The finding without its severity."""
        if not self.first:
            return f"{self.description}: {self.consequence}"
        rows = "1 row" if self.count == 1 else f"{self.count:,} rows"
        return f"{rows} {self.description}, the first at {self.first}: {self.consequence}"

    def __str__(self) -> str:
        return f"{self.severity}: {self.sentence}"


@dataclass(frozen=True)
class Check(Generic[Subject]):
    """A check of one row as it was read, or of one sequence."""

    name: str
    severity: Severity
    find: Callable[[Subject], bool]
    description: str
    consequence: str


class SequenceFacts(NamedTuple):
    """A sequence, as it is rendered and tokenized."""

    rendered: Rendered
    ids: NDArray[np.int32]
    labels: int
    """The number of its labels."""
    prompt_is_prefix: bool
    bos_id: int | None


def has_empty_response(row: ParsedRow) -> bool:
    """Tell a row with an empty response, whose only supervised token is the end token."""
    supervised = (message for message in row.example.messages if message.is_supervised)
    return any(not message.text.strip() and not message.tool_calls for message in supervised)


def ends_with_question(row: ParsedRow) -> bool:
    """Tell a conversation that ends with a question."""
    return row.is_unanswered


def leaves_out_keys(row: ParsedRow) -> bool:
    """Tell a row with keys that no format knows."""
    return bool(row.left_out)


def repeats_question(row: ParsedRow) -> bool:
    """Tell a row in which an answer is the question, or begins with a question of some length."""
    for question, answer in pairwise(row.example.messages):
        asked, said = question.content.strip(), answer.content.strip()
        is_pair = question.role == "user" and answer.is_supervised and bool(asked)
        if is_pair and (said == asked or (len(asked) >= REPEATED and said.startswith(asked))):
            return True
    return False


def is_undecodable(row: ParsedRow) -> bool:
    """Tell a row of which more than half is replacement characters."""
    text = _text(row.example)
    return 2 * text.count(REPLACEMENT) > len(text)


def has_special_tokens(facts: SequenceFacts) -> bool:
    """Tell a row whose own text holds special tokens."""
    return bool(facts.rendered.literal)


def has_two_bos(facts: SequenceFacts) -> bool:
    """Tell a sequence that begins with BOS twice."""
    return facts.bos_id is not None and facts.ids[:2].tolist() == [facts.bos_id] * 2


def changes_prompt(facts: SequenceFacts) -> bool:
    """Tell a sequence whose prompt alone has other tokens."""
    return not facts.prompt_is_prefix


def has_one_token_answer(facts: SequenceFacts) -> bool:
    """Tell a sequence whose answers are, on average, a token and the end token."""
    spans = len(facts.rendered.supervised)
    return spans < facts.labels <= 2 * spans


def lacks_end(facts: SequenceFacts) -> bool:
    """Tell a sequence whose answer ends without an end token."""
    return NO_END in facts.rendered.notes


def loses_reasoning(facts: SequenceFacts) -> bool:
    """Tell a sequence whose reasoning the template leaves out."""
    return REASONING_LOST in facts.rendered.notes


def loses_tools(facts: SequenceFacts) -> bool:
    """Tell a sequence whose tools the template leaves out."""
    return TOOLS_LOST in facts.rendered.notes


def moves_system(facts: SequenceFacts) -> bool:
    """Tell a sequence whose system text stands before the first question."""
    return SYSTEM_MOVED in facts.rendered.notes


ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE
ROW_CHECKS: tuple[Check[ParsedRow], ...] = (
    Check(
        "empty_answer", WARNING, has_empty_response, "with an empty output", "it teaches the model to stop at once"
    ),
    Check(
        "ends_with_question", NOTE, ends_with_question, "ending in a user message without a response",
        "that message is left out",
    ),
    Check("keys_left_out", NOTE, leaves_out_keys, "with keys that are not used", "these keys are left out"),
    Check(
        "answer_repeats_prompt", WARNING, repeats_question, "with an answer that repeats the question",
        "the model learns to repeat what it is asked",
    ),
    Check(
        "undecodable", WARNING, is_undecodable, "of which more than half is undecodable (U+FFFD)",
        "the text was read in a wrong encoding: read the source again, or remove them",
    ),
)  # fmt: skip
SEQUENCE_CHECKS: tuple[Check[SequenceFacts], ...] = (
    Check(
        "special_tokens_in_text", NOTE, has_special_tokens, "with special tokens in their own text",
        "they are encoded as plain text",
    ),
    Check(
        "bos_twice", WARNING, has_two_bos, "beginning with BOS twice", "remove BOS from the text or the template"
    ),
    Check(
        "prompt_not_prefix", WARNING, changes_prompt, "whose prompt alone has other tokens than in training",
        "generation starts otherwise than training: end the prompt with a line break, not with a blank",
    ),
    Check("one_token_answer", NOTE, has_one_token_answer, "with one-token answers", "each teaches one token"),
    Check(
        "no_end_token", WARNING, lacks_end, "whose answer does not end with a special token",
        "generation stops only at what the tokenizer knows as an end",
    ),
    Check(
        "reasoning_lost", WARNING, loses_reasoning, "with reasoning that the chat template leaves out",
        "it is not learned",
    ),
    Check(
        "tools_lost", WARNING, loses_tools, "with tools that the chat template does not show",
        "the model learns calls of tools that it is not told of",
    ),
    Check(
        "system_moved", NOTE, moves_system, "with a system message, for which the chat template has no place",
        "its text stands before the first question",
    ),
)  # fmt: skip
FLAGGED: tuple[Check[Any], ...] = (*ROW_CHECKS, *SEQUENCE_CHECKS)
NAMES = tuple(check.name for check in FLAGGED)


def flags_of_row(row: ParsedRow) -> int:
    """Return a bit for each check of rows that finds something."""
    return sum(1 << bit for bit, check in enumerate(ROW_CHECKS) if check.find(row))


def flags_of_sequence(facts: SequenceFacts) -> int:
    """Return a bit for each check of sequences that finds something, above those for rows."""
    return sum(1 << bit for bit, check in enumerate(SEQUENCE_CHECKS, len(ROW_CHECKS)) if check.find(facts))


class RowFindings:
    """What the checks of rows find while rows are read, before a tokenizer is known."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._firsts: dict[str, str] = {}
        self._keys: Counter[str] = Counter()

    def add(self, location: str, row: ParsedRow) -> None:
        """Check the next row."""
        self._keys.update(row.left_out)
        for check in ROW_CHECKS:
            if check.find(row):
                self._counts[check.name] += 1
                self._firsts.setdefault(check.name, location)

    def __iter__(self) -> Iterator[Finding]:
        names = ", ".join(f'"{key}" {count:,}' for key, count in self._keys.items())
        for check in ROW_CHECKS:
            if count := self._counts[check.name]:
                finding = _finding(check, count, self._firsts[check.name])
                is_keys = check.find is leaves_out_keys
                yield replace(finding, description=f"{finding.description} ({names})") if is_keys else finding


def _finding(check: Check[Any], count: int, first: str) -> Finding:
    return Finding(check.name, check.severity, count, first, check.description, check.consequence)


def _text(example: Example) -> str:
    texts = [text for message in example.messages for text in (message.question, message.reasoning)]
    return "\n".join([*texts, example.text])


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
        yield _finding(check, sum(counts), firsts[0])


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
