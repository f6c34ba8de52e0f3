"""The keys of a row or message: each is used, or named as left out, or its row is refused."""

import ast
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from litlora.data.readers.parsers import RowError, decode_json, json_type

MAX_PYTHON = 200_000
"""Characters of the longest text that is parsed as Python, which takes hundreds of bytes for each item of a list."""
NUMPY = "array("
NUMPY_HINT = "save the rows as JSON Lines or Parquet"
NUMPY_LISTS = re.compile(r"\s*(array\(|\[\s*[{'])")


@dataclass
class Fields:
    """The keys of a JSON object, and those with a value that are not used yet."""

    values: Mapping[str, object]
    unused: dict[str, None] = field(init=False)  # in the order of the object

    def __post_init__(self) -> None:
        self.unused = {key: None for key, value in self.values.items() if not is_empty(value)}

    @classmethod
    def of(cls, value: object) -> Self:
        """Return the keys of a row or message; RowError if it is not an object."""
        if isinstance(value, RowError):
            raise value
        if not isinstance(value, dict):
            raise RowError(f"this is {json_type(value)}, not an object")
        return cls(value)

    def find(self, names: Iterable[str]) -> str | None:
        """Return the first of these keys that has a value, best one that is not empty."""
        found = None
        for name in names:  # not a comprehension: this is called twenty times a row
            value = self.values.get(name)
            if value is not None and not is_empty(value):
                return name
            found = name if value is not None and found is None else found
        return found

    def take(self, *names: str) -> Any:
        """Return the value of the first of these keys that has one, or None, and mark it as used."""
        if (name := self.find(names)) is None:
            return None
        self.unused.pop(name, None)
        return self.values[name]

    def text(self, *names: str) -> str:
        """Return the text under the first of these keys that has a value, or an empty one."""
        name = self.find(names)
        return "" if name is None else self.required_text(name)

    def required_text(self, name: str) -> str:
        """Return the text under a key; RowError if there is none."""
        if name not in self.values:
            raise RowError(f'there is no "{name}"')
        self.take(name)
        return checked_text(self.values[name], name)

    def json(self, *names: str) -> Any:
        """Return the value under the first of these keys that has one, parsed if it is a text, as in CSV files."""
        name, value = self.find(names), self.take(*names)
        if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", NUMPY)):
            return value or None
        try:
            return decode_json(value)
        except (ValueError, RecursionError) as error:
            found = from_python(value)
            hint = f" but as numpy writes it: {NUMPY_HINT}" if NUMPY_LISTS.match(value) else f" ({error})"
            if found is None:
                raise RowError(f'"{name}" is a text that is not valid JSON{hint}') from error
            return found

    def left_out(self, key: str, inner: "Fields") -> None:
        """Add the unused keys of an object under `key`."""
        self.unused |= {f"{key}.{name}": None for name in inner.unused}


def from_python(text: str) -> Any:
    """Return lists and objects as Python writes them, such as pandas in a CSV file; None if the text is nothing so."""
    if len(text) > MAX_PYTHON:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes that no string has
            value = ast.literal_eval(text.strip())
        return json.loads(json.dumps(value))  # tuples become lists
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def is_empty(value: object) -> bool:
    """Return whether a value says nothing, so that nothing is lost with it."""
    return value is None or value == "" or value == [] or value == {}


def checked_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f'"{name}" is {json_type(value)}, not a string')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise RowError(f'"{name}" holds {half}, an unpaired surrogate, which UTF-8 cannot encode') from error
    return value


def check_json(value: object, name: str) -> None:
    """Refuse what train.jsonl cannot hold, such as an unpaired surrogate, or a date from a Parquet file."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f'"{name}" holds what JSON in UTF-8 cannot ({error})') from error
