"""The fenced blocks of a Markdown page, each with what an HTML comment in the line before it tells the tests.

`<!-- not run: REASON -->` exempts commands or code, `<!-- not checked: REASON -->` exempts output, and
`<!-- exit code N -->` stands before commands that fail.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(
    r"^(?:<!-- (?:not (?:run|checked): (?P<reason>.*?)|exit code (?P<code>\d+)) -->\n)?"
    r"```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block: commands (bash), code (python), data (json, yaml), or output (text)."""

    language: str
    text: str
    exempt: bool
    exit_code: int

    @property
    def commands(self) -> list[str]:
        """The command lines of a block of the language bash."""
        return [line for line in self.text.splitlines() if line and not line.startswith("#")]


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page in order."""
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield Block(match["language"], match["text"], bool(match["reason"]), int(match["code"] or 0))


def shape(line: str) -> str:
    """Return a line of output without its numbers, precision and alignment, which depend on the checkpoint."""
    return re.sub(r"\s+", " ", re.sub(r"\d[\d,.]*", "N", line.replace("bfloat16", "float32"))).strip()
