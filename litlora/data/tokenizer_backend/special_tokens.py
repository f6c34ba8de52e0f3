"""Special tokens in the text of messages: marked while a prompt style renders, and encoded as plain text."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

import tokenizers
from tokenizers import AddedToken

from litlora.data.tokenizer_backend.limits import encode_in_time
from litlora.data.tokenizer_backend.sentencepiece_model import SentencePieceModel

GUARD = "\ufdd0"  # a code point that is never a character, so no text needs it
DIGITS = [chr(code) for code in range(0xFDD1, 0xFDF0)]


class SpecialTokens:
    """The special tokens of a tokenizer, and where a text holds them."""

    def __init__(self, texts: Iterable[str], others: Iterable[str] = ()) -> None:
        """Take the special tokens, and the other added tokens, which a text may hold but which can end an answer."""
        self.texts = _longest_first(texts)
        choices = _alternatives(self.texts)
        self._starts = {text[:2] for text in self.texts}
        self._token = re.compile(choices)
        self._first_character = re.compile(f"(?={choices})(.)", re.DOTALL)
        self.ends = _longest_first([*self.texts, *others])
        self._end = re.compile(_alternatives(self.ends))

    def guard(self, value: Any) -> Any:
        """Return a text, or the texts in lists and objects, with a mark inside each special token."""
        if isinstance(value, str):
            found = any(start in value for start in self._starts)
            return self._first_character.sub(rf"\1{GUARD}", value) if found else value
        if isinstance(value, dict):
            return {self.guard(key): self.guard(item) for key, item in value.items()}
        return [self.guard(item) for item in value] if isinstance(value, list | tuple) else value

    def spans(self, text: str, literal: Sequence[int] = ()) -> list[tuple[int, int]]:
        """Return the spans of the special tokens of a text, except for those that start at a literal position."""
        skipped = set(literal)
        found: list[tuple[int, int]] = []
        position = 0
        while match := self._token.search(text, position):
            is_literal = match.start() in skipped
            position = match.start() + 1 if is_literal else match.end()
            if not is_literal:
                found.append(match.span())
        return found

    def leading(self, text: str) -> list[tuple[int, int]]:
        """Return the spans of the tokens at the beginning of a text, which only white space separates."""
        found: list[tuple[int, int]] = []
        position = 0
        while match := self._end.match(text, len(text) - len(text[position:].lstrip())):
            found.append(match.span())
            position = match.end()
        return found

    def trailing(self, text: str) -> list[tuple[int, int]]:
        """Return the spans of the tokens at the end of a text, which only white space separates."""
        found: list[tuple[int, int]] = []
        end = len(text.rstrip())
        while token := next((token for token in self.ends if text.endswith(token, 0, end)), None):
            found.insert(0, (end - len(token), end))
            end = len(text[: found[0][0]].rstrip())
        return found


def _longest_first(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({text for text in texts if text}, key=lambda text: (-len(text), text)))


def _alternatives(texts: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, texts)) or '(?!)'})"


def without_guards(text: str) -> tuple[str, list[int]]:
    """Return a rendered text without its marks, and the positions in it where a literal special token starts."""
    pieces = text.split(GUARD)
    literal, length = [], 0
    for piece in pieces[:-1]:
        length += len(piece)
        literal.append(length - 1)
    return "".join(pieces), literal


def position_without_guards(text: str, position: int) -> int:
    """Return the position in the text without marks that corresponds to a position in the text with them."""
    return position - text.count(GUARD, 0, position)


class LiteralEncoder:
    """A tokenizer that takes special tokens as plain text, except at given spans.

    An alias of the same length, made of code points that are no characters, stands for a token that is meant.
    """

    def __init__(self, backend: tokenizers.Tokenizer | SentencePieceModel) -> None:
        self._backend = _without_special_tokens(backend)
        special = {i: token for i, token in backend.get_added_tokens_decoder().items() if token.special}
        numbers: defaultdict[int, count[int]] = defaultdict(count)  # of the aliases of each length
        self._alias = {t.content: _alias(next(numbers[len(t.content)]), len(t.content)) for t in special.values()}
        self._backend.add_tokens([_renamed(token, self._alias[token.content]) for token in special.values()])
        self._ids = {self._backend.token_to_id(self._alias[token.content]): i for i, token in special.items()}

    def encode(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text and their spans; only the special tokens at `spans` are encoded as such."""
        for start, end in spans:
            text = text[:start] + self._alias.get(text[start:end], text[start:end]) + text[end:]
        encoding = encode_in_time(self._backend, [text], False)[0]
        return [self._ids.get(i, i) for i in encoding.ids], encoding.offsets


def _without_special_tokens(backend: tokenizers.Tokenizer | SentencePieceModel) -> Any:
    """Return a copy of a tokenizer that takes special tokens as plain text."""
    if isinstance(backend, SentencePieceModel):
        return backend.without_special_tokens()
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = True
    return copy


def _alias(number: int, length: int) -> str:
    """Return a text of this length that no other number of the same length has; only its first character is GUARD."""
    digits = [GUARD]
    for _ in range(length - 1):
        number, digit = divmod(number, len(DIGITS))
        digits.append(DIGITS[digit])
    return "".join(digits)


def _renamed(token: AddedToken, content: str) -> AddedToken:
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=False,
    )
