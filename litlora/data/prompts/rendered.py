"""What a prompt style makes of an example: text, with the characters that are supervised."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from litlora.data.tokenizer_backend.special_tokens import position_without_guards, without_guards

REASONING_LOST, TOOLS_LOST, NO_END, SYSTEM_MOVED = "reasoning lost", "tools lost", "no end token", "system moved"


@dataclass(frozen=True)
class Rendered:
    """One sequence of an example: its text, and its supervised spans [start, end), each a response with its end token.

    An example is several sequences where a later answer does not see the earlier ones as they were trained.
    """

    text: str
    supervised: tuple[tuple[int, int], ...] = ()
    literal: tuple[int, ...] = ()
    """Where text of the example holds a special token, which is encoded as plain text."""
    notes: frozenset[str] = frozenset()
    """What the style left out, or could not do."""

    @classmethod
    def of(cls, guarded: str, supervised: Sequence[tuple[int, int]] = (), notes: frozenset[str] = frozenset()) -> Self:
        """Remove the marks from a text, and move the spans accordingly."""
        text, literal = without_guards(guarded)
        spans = tuple(
            (position_without_guards(guarded, start), position_without_guards(guarded, end))
            for start, end in supervised
        )
        return cls(text, spans, tuple(literal), notes)

    @property
    def prompt(self) -> str:
        """The text before the first response."""
        return self.text[: self.supervised[0][0]] if self.supervised else self.text

    def prompt_from(self, start: int) -> "Rendered":
        """Return the prompt from a position on."""
        prompt = self.prompt[start:]
        return Rendered(prompt, (), tuple(at - start for at in self.literal if start <= at < start + len(prompt)))

    @property
    def last_prompt(self) -> "Rendered":
        """The text before the last response."""
        end = self.supervised[-1][0]
        return Rendered(self.text[:end], (), tuple(at for at in self.literal if at < end))
