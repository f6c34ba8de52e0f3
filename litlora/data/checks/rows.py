"""Checks of one row as it was read, or of one sequence; what they find is stored with the tokens, a bit each."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from litlora.data.checks.findings import Check, Finding, Severity, finding_of
from litlora.data.examples import Example
from litlora.data.prompts.rendered import NO_END, REASONING_LOST, SYSTEM_MOVED, TOOLS_LOST, Rendered
from litlora.data.readers.row_formats import ParsedRow

REPEATED = 30  # characters of a question with which an answer begins that repeats it
REPLACEMENT = "\ufffd"  # what decoding puts in place of bytes that are no character


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


def has_note(note: str, facts: SequenceFacts) -> bool:
    """Tell a sequence of which the prompt style notes that it left something out, or could not do it."""
    return note in facts.rendered.notes


WARNING, NOTE = Severity.WARNING, Severity.NOTE
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
        "no_end_token", WARNING, partial(has_note, NO_END), "whose answer does not end with a special token",
        "generation stops only at what the tokenizer knows as an end",
    ),
    Check(
        "reasoning_lost", WARNING, partial(has_note, REASONING_LOST),
        "with reasoning that the chat template leaves out", "it is not learned",
    ),
    Check(
        "tools_lost", WARNING, partial(has_note, TOOLS_LOST), "with tools that the chat template does not show",
        "the model learns calls of tools that it is not told of",
    ),
    Check(
        "system_moved", NOTE, partial(has_note, SYSTEM_MOVED),
        "with a system message, for which the chat template has no place", "its text stands before the first question",
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
                finding = finding_of(check, count, self._firsts[check.name])
                is_keys = check.find is leaves_out_keys
                yield replace(finding, description=f"{finding.description} ({names})") if is_keys else finding


def _text(example: Example) -> str:
    texts = [text for message in example.messages for text in (message.question, message.reasoning)]
    return "\n".join([*texts, example.text])
