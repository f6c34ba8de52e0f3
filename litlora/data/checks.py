"""Checks of the data: findings about rows that are valid, but may teach something else than intended.

A check is a function of all rows that returns a finding or None; a new check is a new entry of CHECKS.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from litlora.data.examples import Example
from litlora.data.row_formats import ParsedRow

LocatedRow = tuple[str, ParsedRow]
"""A row with its location: file and line."""


class Finding(NamedTuple):
    """Rows with something in common, and what it means for training."""

    locations: Sequence[str]
    description: str
    consequence: str

    def __str__(self) -> str:
        rows = "1 row" if len(self.locations) == 1 else f"{len(self.locations):,} rows"
        return f"{rows} {self.description}, the first at {self.locations[0]}: {self.consequence}"


def find_empty_responses(rows: Sequence[LocatedRow]) -> Finding | None:
    """Find rows with an empty response, whose only supervised token is the end token."""
    locations = [location for location, row in rows if _has_empty_response(row.example)]
    return _finding(locations, "with an empty output", "it teaches the model to stop at once")


def _has_empty_response(example: Example) -> bool:
    supervised = (message for message in example.messages if message.is_supervised)
    return any(not message.text and not message.tool_calls for message in supervised)


def find_unanswered_messages(rows: Sequence[LocatedRow]) -> Finding | None:
    """Find conversations that end in a user message, which is not part of the example."""
    locations = [location for location, row in rows if row.is_unanswered]
    return _finding(locations, "ending in a user message without a response", "that message is left out")


def _finding(locations: Sequence[str], description: str, consequence: str) -> Finding | None:
    return Finding(locations, description, consequence) if locations else None


def find_left_out_keys(rows: Sequence[LocatedRow]) -> Finding | None:
    """Find rows with keys that no format knows."""
    counts = Counter(key for _, row in rows for key in row.left_out)
    locations = [location for location, row in rows if row.left_out]
    keys = ", ".join(f'"{key}" {count:,}' for key, count in counts.items())
    return _finding(locations, f"with keys that are not used ({keys})", "these keys are left out")


CHECKS: tuple[Callable[[Sequence[LocatedRow]], Finding | None], ...] = (
    find_empty_responses,
    find_unanswered_messages,
    find_left_out_keys,
)


def run_checks(rows: Sequence[LocatedRow]) -> list[Finding]:
    """Return the findings of all checks."""
    return [finding for check in CHECKS if (finding := check(rows))]
