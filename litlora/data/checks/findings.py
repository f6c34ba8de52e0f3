"""What a check finds: rows with something in common, and what it means for training."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

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


def finding_of(check: Check[Any], count: int, first: str) -> Finding:
    """Return what a check has found."""
    return Finding(check.name, check.severity, count, first, check.description, check.consequence)
