"""JSONL of examples: how a row is read, checked, split and written."""

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

from litlora.data.readers import RawFile, RowError, jsonl_lines, jsonl_rows, kind, open_file, parse_rows
from litlora.errors import LitLoraError
from litlora.utils.files import complete_transaction, write_transaction


@dataclass(frozen=True)
class Turn:
    """One instruction, its optional input, and the answer that is learned."""

    instruction: str
    output: str
    input: str = ""


@dataclass(frozen=True)
class Example:
    """One row of data: a single turn, or a conversation whose every answer is supervised."""

    turns: tuple[Turn, ...]
    system: str = ""


Fields = Mapping[str, object]


class Reading(NamedTuple):
    """The example in a row, and whether a last question without an answer was left out of it."""

    example: Example
    left_out: bool = False


class RowFormat(NamedTuple):
    """How rows look, in words for whoever wrote a wrong one, and how they are read."""

    shape: str
    read: Callable[[Fields], Reading]


Place = TypeVar("Place")


def read_examples(path: Path) -> list[Example]:
    """Read the examples of a prepared split, or say how to prepare it."""
    with open_split(path) as file:
        raw = RawFile(str(path), path.suffix, file.read())
    return [reading.example for _, reading in read_file(raw, ANY)]


def open_split(path: Path) -> BufferedReader:
    """Open a prepared split, or say how to prepare it."""
    complete_transaction(path.parent)
    command = f"litlora prepare_json --source FILE --destination_path {path.parent}"
    return open_file(path, if_missing=f"no {path.name} in {path.parent}; prepare one with: {command}")


def read_example(path: Path, index: int, flag: str) -> Example:
    """Read the row of a prepared split that `flag` asks for, counted from 0, and no other where all is well."""
    with open_split(path) as file:
        rows = jsonl_rows(jsonl_lines(file))
        _, row = next(islice(rows, index, None), (0, RowError()))
    with suppress(RowError):
        return ANY.read(_fields(row)).example
    rows_there = len(read_examples(path))  # says what is wrong with them, if that is so
    raise LitLoraError(f"{flag} ({index}) must be below the number of rows in {path.name} ({rows_there})")


def read_file(file: RawFile, row_format: RowFormat) -> list[tuple[str, Reading]]:
    """Read every row and its place; name the first bad row and say how many more there are."""
    readings, bad = read_rows(parse_rows(file), row_format)
    require_rows(file.name, len(readings), [f"{place}: {error}" for place, error in bad], row_format)
    return readings


def read_rows(
    rows: Iterable[tuple[Place, object]], row_format: RowFormat
) -> tuple[list[tuple[Place, Reading]], list[tuple[Place, RowError]]]:
    """Read rows at their places, and find those that are wrong."""
    readings, bad = [], []
    for place, row in rows:
        try:
            readings.append((place, row_format.read(_fields(row))))
        except RowError as error:
            bad.append((place, error))
    return readings, bad


def require_rows(name: str, rows: int, bad: Sequence[str], row_format: RowFormat) -> None:
    """Refuse a file that has bad rows, by the first of them and the number of the others, or no row at all."""
    if bad:
        more = f" (wrong rows after it: {len(bad) - 1:,})" if len(bad) > 1 else ""
        raise LitLoraError(f"{bad[0]}{more}; a row must look like {row_format.shape}")
    if not rows:
        raise LitLoraError(f"{name} holds no rows; a row must look like {row_format.shape}")


def _fields(row: object) -> Fields:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError(f"this is {kind(row)}, not an object")
    return row


def _read_any(fields: Fields) -> Reading:
    if "messages" in fields:
        return read_messages(fields["messages"])
    for question, answer in (("instruction", "output"), ("prompt", "completion")):
        if question in fields or answer in fields:
            return _read_pair(fields, question, answer)
    raise RowError(f"the keys {reprlib.repr(list(fields))} are none that is known")


def _read_alpaca(fields: Fields) -> Reading:
    return _read_pair(fields, "instruction", "output")


def _read_pair(fields: Fields, question: str, answer: str) -> Reading:
    context = "" if fields.get("input") is None else _text(fields, "input")
    return Reading(Example((Turn(_text(fields, question), _text(fields, answer), context),)))


def read_messages(messages: object) -> Reading:
    """Read a conversation: an optional system message, then questions and answers by turns."""
    if not isinstance(messages, list):
        raise RowError(f'"messages" is {kind(messages)}, not a list')
    said = [_said(number, message) for number, message in enumerate(messages, start=1)]
    system = said.pop(0)[1] if said and said[0][0] == "system" else ""
    _check_roles([role for role, _ in said], first=len(messages) - len(said) + 1)
    texts = [content for _, content in said]
    turns = tuple(Turn(question, answer) for question, answer in zip(texts[::2], texts[1::2], strict=False))
    if not turns:
        raise RowError("the conversation has no answer")
    return Reading(Example(turns, system), left_out=len(texts) % 2 == 1)


def _said(number: int, message: object) -> tuple[str, str]:
    """Check one message by itself and take its role and content."""
    try:
        fields = _fields(message)
        role, content = _text(fields, "role"), _text(fields, "content")
    except RowError as error:
        raise RowError(f"message {number}: {error}") from error
    if role not in ("system", "user", "assistant"):
        raise RowError(f"message {number}: the role {reprlib.repr(role)} is not system, user or assistant")
    return role, content


def _check_roles(roles: Sequence[str], first: int) -> None:
    """Refuse roles, from message `first` on, unless they are user, assistant, user, assistant and so on."""
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
        raise RowError(f'"{key}" is {kind(value)}, not a string')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise RowError(f'"{key}" holds {half}, half of a character that cannot be written as UTF-8') from error
    return value


_ALPACA_SHAPE = '{"instruction": "...", "input": "...", "output": "..."}'
_MESSAGES_SHAPE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
ALPACA = RowFormat(_ALPACA_SHAPE, _read_alpaca)
ANY = RowFormat(f'{_ALPACA_SHAPE}, {{"prompt": "...", "completion": "..."}} or {_MESSAGES_SHAPE}', _read_any)


def split(examples: list[Example], val_split_fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into training and validation examples exactly as Lit-GPT does, so that losses compare."""
    # Here, not above: torch takes seconds to import, and a bad row is to be named before that.
    from torch import Generator
    from torch.utils.data import random_split

    fractions = [1 - val_split_fraction, val_split_fraction]
    with warnings.catch_warnings(action="ignore"):  # torch warns of an empty part; it is refused below
        # A list has all that random_split asks of a Dataset: a length.
        parts = random_split(examples, fractions, Generator().manual_seed(seed))  # type: ignore[arg-type, var-annotated]
    train, val = ([examples[index] for index in part.indices] for part in parts)
    if not val:  # while the training part gets what rounding leaves over
        raise LitLoraError(
            f"--val_split_fraction ({val_split_fraction}) leaves no row for validation ({len(examples)} in all); "
            "choose a larger fraction or add rows"
        )
    return train, val


def write_dataset(
    destination: Path, train: Sequence[Example], val: Sequence[Example], origin: Mapping[str, object]
) -> None:
    """Write train.jsonl, val.jsonl and dataset.json, which says where they came from."""
    facts = {**origin, "rows": len(train) + len(val), "train": len(train), "val": len(val)}
    about = json.dumps(facts, ensure_ascii=False, indent=2) + "\n"
    write_transaction(
        destination,
        {
            "train.jsonl": _to_jsonl(train),
            "val.jsonl": _to_jsonl(val),
            "dataset.json": about.encode(errors="backslashreplace"),  # a file's name may be no UTF-8
        },
    )


def _to_jsonl(examples: Sequence[Example]) -> bytes:
    return "".join(json.dumps(_to_row(example), ensure_ascii=False) + "\n" for example in examples).encode()


def _to_row(example: Example) -> dict[str, object]:
    """Build the row that reads as `example`; a single turn without a system prompt takes Alpaca's shape."""
    if len(example.turns) == 1 and not example.system:
        turn = example.turns[0]
        return {"instruction": turn.instruction, "input": turn.input, "output": turn.output}
    if any(turn.input for turn in example.turns):
        raise ValueError(f"a conversation has no place for an input: {example}")
    return {"messages": [{"role": role, "content": content} for role, content in _messages(example)]}


def _messages(example: Example) -> Iterator[tuple[str, str]]:
    if example.system:
        yield "system", example.system
    for turn in example.turns:
        yield "user", turn.instruction
        yield "assistant", turn.output
