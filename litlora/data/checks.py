"""Checks of the data: findings about rows that are valid, but may teach something else than intended.

A check is a function of all rows that returns a finding or None; a new check is a new entry of CHECKS.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from litlora.data.examples import ParsedRow

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
    locations = [location for location, row in rows if any(not turn.output for turn in row.example.turns)]
    return _finding(locations, "with an empty output", "it teaches the model to stop at once")


def find_unanswered_messages(rows: Sequence[LocatedRow]) -> Finding | None:
    """Find conversations that end in a user message, which is not part of the example."""
    locations = [location for location, row in rows if row.left_out]
    return _finding(locations, "ending in a user message without a response", "that message is left out")


def _finding(locations: Sequence[str], description: str, consequence: str) -> Finding | None:
    return Finding(locations, description, consequence) if locations else None


CHECKS: tuple[Callable[[Sequence[LocatedRow]], Finding | None], ...] = (find_empty_responses, find_unanswered_messages)


def run_checks(rows: Sequence[LocatedRow]) -> list[Finding]:
    """Return the findings of all checks."""
    return [finding for check in CHECKS if (finding := check(rows))]
