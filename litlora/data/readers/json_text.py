"""JSON texts of any size: their values one by one, with only a window of the text in memory."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NoReturn

from litlora.data.readers.raw_files import MAX_ROW, not_utf8
from litlora.errors import LitLoraError

BLANKS = re.compile(r"[ \t\r\n]*")
LONGEST_TOKEN = 16
"""Characters before the end of a window in which an error may only mean that a token, such as -Infinity, is cut."""


class JsonText:
    """A JSON text, and how far it has been read."""

    def __init__(self, name: str, chunks: Iterable[bytes], decoder: json.JSONDecoder) -> None:
        self._name = name
        self._chunks = _decoded(name, chunks)
        self._decoder = decoder
        self._window = ""
        self._position = 0
        # What came before the window: characters, line ends, and characters since the last line end
        self._offset = self._lines = self._column = 0

    def peek(self) -> str:
        """Skip blanks, and return the next character; at the end, an empty text."""
        while True:
            blanks = BLANKS.match(self._window, self._position)
            self._position = blanks.end() if blanks else self._position
            if self._position < len(self._window) or not self._extend():
                return self._window[self._position : self._position + 1]

    def elements(self) -> Iterator[Any]:
        """Yield the elements of the array that comes next."""
        self._expect("[")
        while self.peek() != "]":
            yield self.value()
            if self.peek() != "]":
                self._expect(",")
        self._expect("]")

    def keys(self) -> Iterator[str]:
        """Yield the keys of the object that comes next; the caller reads each value before the next key."""
        self._expect("{")
        while self.peek() != "}":
            if self.peek() != '"':
                self._refuse("Expecting property name enclosed in double quotes")
            key = self.value()
            self._expect(":")
            yield key
            if self.peek() != "}":
                self._expect(",")
        self._expect("}")

    def value(self) -> Any:
        """Return the value that comes next."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._window, self._position)
            except json.JSONDecodeError as error:
                if not self._may_be_cut(error) or not self._extend():
                    self._refuse_error(error)
                continue
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, deeply nested lists
                raise LitLoraError(f"{self._name} is not valid JSON ({error})") from error
            length = end - self._position
            if end < len(self._window) or not self._extend():  # else a number may continue
                self._position += length
                return value

    def end(self) -> None:
        """Refuse a text that continues."""
        if self.peek():
            self._refuse("Extra data")

    def _expect(self, character: str) -> None:
        if self.peek() != character:
            self._refuse(f"Expecting '{character}' delimiter")
        self._position += 1

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Tell an error that more of the text may mend."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self._window) - LONGEST_TOKEN

    def _extend(self) -> bool:
        """Read on until what has not been used has doubled in length; False at the end of the text."""
        if (chunk := next(self._chunks, None)) is None:
            return False
        rest = self._drop()
        if len(rest) > MAX_ROW:
            start = f"{self._name}: what begins in line {self._lines + 1:,}"
            raise LitLoraError(f"{start} is longer than {MAX_ROW >> 20} MB: is a bracket or a quote not closed?")
        parts, size = [rest, chunk], len(chunk)
        while size < len(rest) and (chunk := next(self._chunks, "")):
            parts.append(chunk)
            size += len(chunk)
        self._window = "".join(parts)
        return True

    def _drop(self) -> str:
        """Forget what has been used, except for its place; return the rest."""
        used, rest = self._window[: self._position], self._window[self._position :]
        line_ends = used.count("\n")
        self._column = len(used) - used.rfind("\n") - 1 if line_ends else self._column + len(used)
        self._lines += line_ends
        self._offset += len(used)
        self._window, self._position = rest, 0
        return rest

    def _refuse(self, fault: str) -> NoReturn:
        self._refuse_error(json.JSONDecodeError(fault, self._window, self._position))

    def _refuse_error(self, error: json.JSONDecodeError) -> NoReturn:
        column = error.colno + (self._column if error.lineno == 1 else 0)
        place = f"line {self._lines + error.lineno} column {column} (char {self._offset + error.pos})"
        raise LitLoraError(f"{self._name} is not valid JSON ({error.msg}: {place})") from error


def _decoded(name: str, chunks: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    for chunk in chain(chunks, [None]):
        try:
            yield decoder.decode(chunk or b"", final=chunk is None)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise LitLoraError(f"{name} line {line}: {not_utf8(error)}") from error
        line += (chunk or b"").count(b"\n")
