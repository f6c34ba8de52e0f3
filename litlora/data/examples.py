"""Examples: how rows are parsed and validated, split, and written as JSONL."""

import json
import reprlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

from litlora.data.readers import RawFile, RowError, json_type, jsonl_lines, jsonl_rows, open_file, parse_rows
from litlora.errors import LitLoraError
from litlora.utils.files import complete_transaction, write_transaction


@dataclass(frozen=True)
class Turn:
    """One instruction, its optional input, and the supervised response."""

    instruction: str
    output: str
    input: str = ""


@dataclass(frozen=True)
class Example:
    """One row of data: a single turn, or a conversation in which every response is supervised."""

    turns: tuple[Turn, ...]
    system: str = ""


Fields = Mapping[str, object]


class ParsedRow(NamedTuple):
    """The example in a row."""

    example: Example
    left_out: bool = False
    """Whether the row ends in a user message without a response, which is not part of the example."""


class RowFormat(NamedTuple):
    """How rows are parsed, and what they look like, for error messages."""

    shape: str
    parse: Callable[[Fields], ParsedRow]


Location = TypeVar("Location")


def read_examples(path: Path) -> list[Example]:
    """Read the examples of a prepared split."""
    with open_split(path) as file:
        raw = RawFile(str(path), path.suffix, file.read())
    return [row.example for _, row in read_file(raw, ANY)]


def open_split(path: Path) -> BufferedReader:
    """Open a prepared split; LitLoraError with the command to prepare it if it is missing."""
    complete_transaction(path.parent)
    command = f"litlora prepare_json --source FILE --destination_path {path.parent}"
    return open_file(path, if_missing=f"no {path.name} in {path.parent}; prepare one with: {command}")


def read_example(path: Path, index: int, flag: str) -> Example:
    """Read one row of a prepared split, counted from 0, without reading the others unless it is invalid."""
    with open_split(path) as file:
        rows = jsonl_rows(jsonl_lines(file))
        _, row = next(islice(rows, index, None), (0, RowError()))
    with suppress(RowError):
        return ANY.parse(_fields(row)).example
    count = len(read_examples(path))  # raises if a row is invalid
    raise LitLoraError(f"{flag} ({index}) must be below the number of rows in {path.name} ({count})")


def read_file(file: RawFile, row_format: RowFormat) -> list[tuple[str, ParsedRow]]:
    """Return every row with its location; LitLoraError if any is invalid."""
    rows, invalid = read_rows(parse_rows(file), row_format)
    require_rows(file.name, len(rows), [f"{location}: {error}" for location, error in invalid], row_format)
    return rows


def read_rows(
    rows: Iterable[tuple[Location, object]], row_format: RowFormat
) -> tuple[list[tuple[Location, ParsedRow]], list[tuple[Location, RowError]]]:
    """Parse rows; return the valid ones and the errors of the invalid ones, with their locations."""
    parsed, invalid = [], []
    for location, row in rows:
        try:
            parsed.append((location, row_format.parse(_fields(row))))
        except RowError as error:
            invalid.append((location, error))
    return parsed, invalid


def require_rows(name: str, rows: int, invalid: Sequence[str], row_format: RowFormat) -> None:
    """Refuse a file without rows, or with invalid ones: name the first and count the others."""
    if invalid:
        more = f" (invalid rows after it: {len(invalid) - 1:,})" if len(invalid) > 1 else ""
        raise LitLoraError(f"{invalid[0]}{more}; a row must look like {row_format.shape}")
    if not rows:
        raise LitLoraError(f"{name} holds no rows; a row must look like {row_format.shape}")


def _fields(row: object) -> Fields:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError(f"this is {json_type(row)}, not an object")
    return row


def _parse_any(fields: Fields) -> ParsedRow:
    if "messages" in fields:
        return parse_messages(fields["messages"])
    for prompt, response in (("instruction", "output"), ("prompt", "completion")):
        if prompt in fields or response in fields:
            return _parse_pair(fields, prompt, response)
    raise RowError(f"the keys {reprlib.repr(list(fields))} match no row format")


def _parse_alpaca(fields: Fields) -> ParsedRow:
    return _parse_pair(fields, "instruction", "output")


def _parse_pair(fields: Fields, prompt: str, response: str) -> ParsedRow:
    context = "" if fields.get("input") is None else _text(fields, "input")
    return ParsedRow(Example((Turn(_text(fields, prompt), _text(fields, response), context),)))


def parse_messages(messages: object) -> ParsedRow:
    """Parse a conversation: an optional system message, then user and assistant messages in turn."""
    if not isinstance(messages, list):
        raise RowError(f'"messages" is {json_type(messages)}, not a list')
    pairs = [_role_and_content(number, message) for number, message in enumerate(messages, start=1)]
    system = pairs.pop(0)[1] if pairs and pairs[0][0] == "system" else ""
    _check_roles([role for role, _ in pairs], first=len(messages) - len(pairs) + 1)
    texts = [content for _, content in pairs]
    turns = tuple(Turn(user, assistant) for user, assistant in zip(texts[::2], texts[1::2], strict=False))
    if not turns:
        raise RowError("the conversation has no response")
    return ParsedRow(Example(turns, system), left_out=len(texts) % 2 == 1)


def _role_and_content(number: int, message: object) -> tuple[str, str]:
    try:
        fields = _fields(message)
        role, content = _text(fields, "role"), _text(fields, "content")
    except RowError as error:
        raise RowError(f"message {number}: {error}") from error
    if role not in ("system", "user", "assistant"):
        raise RowError(f"message {number}: the role {reprlib.repr(role)} is not system, user or assistant")
    return role, content


def _check_roles(roles: Sequence[str], first: int) -> None:
    """Refuse roles, from message `first` on, unless they alternate between user and assistant."""
    for number, (before, role) in enumerate(pairwise(["assistant", *roles]), start=first):
        if role == "system":
            raise RowError(f"message {number}: only the first message may be the system's")
        if role == before:
            expected = "user" if role == "assistant" else "assistant"
            raise RowError(f"message {number}: the role is {role}, but it is the {expected}'s turn")


def _text(fields: Fields, key: str) -> str:
    if key not in fields:
        raise RowError(f'there is no "{key}"')
    value = fields[key]
    if not isinstance(value, str):
        raise RowError(f'"{key}" is {json_type(value)}, not a string')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise RowError(f'"{key}" holds {half}, an unpaired surrogate, which UTF-8 cannot encode') from error
    return value


_ALPACA_SHAPE = '{"instruction": "...", "input": "...", "output": "..."}'
_MESSAGES_SHAPE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
ALPACA = RowFormat(_ALPACA_SHAPE, _parse_alpaca)
ANY = RowFormat(f'{_ALPACA_SHAPE}, {{"prompt": "...", "completion": "..."}} or {_MESSAGES_SHAPE}', _parse_any)


def split(examples: list[Example], val_split_fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into training and validation examples exactly as Lit-GPT does, so that losses are comparable."""
    # Imported late: torch takes seconds, and an invalid row is reported before that
    from torch import Generator
    from torch.utils.data import random_split

    fractions = [1 - val_split_fraction, val_split_fraction]
    with warnings.catch_warnings(action="ignore"):  # torch warns of an empty subset; it is refused below
        # A list has all that random_split needs of a Dataset: a length
        subsets = random_split(examples, fractions, Generator().manual_seed(seed))  # type: ignore[arg-type, var-annotated]
    train, val = ([examples[index] for index in subset.indices] for subset in subsets)
    if not val:  # rounding never leaves the training split empty
        raise LitLoraError(
            f"--val_split_fraction ({val_split_fraction}) leaves no row for validation ({len(examples)} in all); "
            "choose a larger fraction or add rows"
        )
    return train, val


def write_dataset(
    destination: Path, train: Sequence[Example], val: Sequence[Example], origin: Mapping[str, object]
) -> None:
    """Write train.jsonl, val.jsonl, and dataset.json with their origin."""
    facts = {**origin, "rows": len(train) + len(val), "train": len(train), "val": len(val)}
    about = json.dumps(facts, ensure_ascii=False, indent=2) + "\n"
    write_transaction(
        destination,
        {
            "train.jsonl": _to_jsonl(train),
            "val.jsonl": _to_jsonl(val),
            "dataset.json": about.encode(errors="backslashreplace"),  # a file name need not be UTF-8
        },
    )


def _to_jsonl(examples: Sequence[Example]) -> bytes:
    return "".join(json.dumps(_to_row(example), ensure_ascii=False) + "\n" for example in examples).encode()


def _to_row(example: Example) -> dict[str, object]:
    """Return the row that parses to `example`; a single turn without a system prompt has Alpaca's keys."""
    if len(example.turns) == 1 and not example.system:
        turn = example.turns[0]
        return {"instruction": turn.instruction, "input": turn.input, "output": turn.output}
    if any(turn.input for turn in example.turns):
        raise ValueError(f"a conversation cannot hold an input: {example}")
    return {"messages": [{"role": role, "content": content} for role, content in _messages(example)]}


def _messages(example: Example) -> Iterator[tuple[str, str]]:
    if example.system:
        yield "system", example.system
    for turn in example.turns:
        yield "user", turn.instruction
        yield "assistant", turn.output
