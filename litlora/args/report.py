"""The flags of report."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from litlora.args.common import CommandArgs, require


@dataclass(frozen=True)
class ReportArgs(CommandArgs):
    """Write the HTML page of a run again, or compare several runs on one page."""

    examples: ClassVar = (
        "litlora report out/alpaca",
        "litlora report out/lora out/dora --out_file comparison.html",
    )

    runs: tuple[Path, ...]
    """Output folders of runs: of one for its page, of several to compare them."""
    out_file: Path | None = None
    """The HTML file, by default RUN/final/report.html, and for several runs report.html."""

    def __post_init__(self) -> None:
        require(bool(self.runs), "--runs", "", "at least one output folder of a run")
