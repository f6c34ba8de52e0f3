"""The fenced blocks of a Markdown page, each with the reason why it is not checked, if it has one.

An HTML comment in the line before a block exempts it: `<!-- not run: REASON -->` before commands or code, and
`<!-- not checked: REASON -->` before output.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>not run|not checked)(?:: (?P<reason>.*?))? -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block: commands (bash), code (python), data (json, yaml), or output (text)."""

    language: str
    text: str
    exempt: bool
    reason: str

    @property
    def commands(self) -> list[str]:
        """The command lines of a block of the language bash."""
        return [line for line in self.text.splitlines() if line and not line.startswith("#")]


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page in order."""
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield Block(match["language"], match["text"], match["mark"] is not None, match["reason"] or "")
