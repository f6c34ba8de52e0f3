"""Data sets as files: sources and prepared folders are read, split, and written as JSONL."""

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from litlora.data.examples import Example
from litlora.data.prompts.styles import AUTO
from litlora.data.readers.parsers import RowError, jsonl_lines, jsonl_rows, parse_rows
from litlora.data.readers.raw_files import RawFile, open_file
from litlora.data.readers.row_formats import ANY, ParsedRow, RowFormat
from litlora.data.readers.row_store import Selection
from litlora.errors import LitLoraError
from litlora.utils.files import complete_transaction, read_json, refuse_device, write_transaction

TRAIN, VAL, ABOUT = "train.jsonl", "val.jsonl", "dataset.json"
Lines = list[bytes] | Selection
Location = TypeVar("Location")
ROWS_FOR_STYLE = 100  # of the training split, which --prompt_style auto looks at


def read_examples(path: Path) -> list[Example]:
    """Read the examples of a prepared split."""
    return [example for _, example in read_located_examples(path)]


def read_located_examples(path: Path) -> list[tuple[str, Example]]:
    """Read the examples of a prepared split, each with the location of its row."""
    return [(location, row.example) for location, row in read_file(_raw_split(path), ANY)]


def count_rows(path: Path) -> int:
    """Return the number of rows of a prepared split; LitLoraError if any is invalid."""
    return sum(1 for _ in read_file(_raw_split(path), ANY))


def _raw_split(path: Path) -> RawFile:
    open_split(path).close()
    return RawFile(str(path), path.suffix, lambda: open_split(path))


def open_split(path: Path) -> BufferedReader:
    """Open a prepared split; LitLoraError with the command to prepare it if it is missing."""
    if (file := path.parent).is_file():
        command = f"litlora prepare_json --source {file} --destination_path FOLDER"
        raise LitLoraError(f"--data_dir ({file}) is a file; prepare a folder of it with: {command}")
    complete_transaction(path.parent)
    refuse_device(path)
    command = f"litlora prepare_json --source FILE --destination_path {path.parent}"
    return open_file(path, if_missing=f"no {path.name} in {path.parent}; prepare one with: {command}")


def read_example(path: Path, index: int, flag: str) -> Example:
    """Read one row of a prepared split, counted from 0, without reading the others unless it is invalid."""
    with open_split(path) as file:
        rows = jsonl_rows(jsonl_lines(file))
        _, row = next(islice(rows, index, None), (0, RowError()))
    with suppress(RowError):
        return ANY.parse(row).example
    count = count_rows(path)  # raises if a row is invalid
    raise LitLoraError(f"{flag} ({index}) must be below the number of rows in {path.name} ({count})")


def read_some_examples(path: Path, first: int, count: int) -> list[Example]:
    """Read up to `count` rows of a prepared split from one on, counted from 0; one that is invalid ends them."""
    with open_split(path) as file:
        rows, _ = read_rows(islice(jsonl_rows(jsonl_lines(file)), first, first + max(0, count)), ANY)
    return [row.example for _, row in rows]


def choose_prompt_style(name: str, split: Path, chat_template: str | None) -> tuple[str, str]:
    """Return what --prompt_style auto stands for, and why: chat for conversations and a chat template, else alpaca."""
    if name != AUTO:
        return name, "as requested"
    with open_split(split) as file:
        rows, _ = read_rows(islice(jsonl_rows(jsonl_lines(file)), ROWS_FOR_STYLE), ANY)
    has_conversations = any(row.example.is_chat for _, row in rows)
    rows_are = "the rows are conversations" if has_conversations else "the rows are instructions"
    template = "has no chat template" if chat_template is None else "has a chat template"
    choice = "chat" if has_conversations and chat_template is not None else "alpaca"
    return choice, f"{rows_are}, and the checkpoint {template}"


@dataclass
class Invalid:
    """The invalid rows of a file: the first with its error, and how many there are."""

    first: str = ""
    count: int = 0

    def add(self, location: object, error: object) -> None:
        """Count the next invalid row."""
        self.first = self.first or f"{location}: {error}"
        self.count += 1


def read_file(file: RawFile, row_format: RowFormat) -> Iterator[tuple[str, ParsedRow]]:
    """Yield every row with its location; LitLoraError at the end if any is invalid."""
    rows, invalid = 0, Invalid()
    for location, row in parse_rows(file):
        try:
            parsed = row_format.parse(row)
        except RowError as error:
            invalid.add(location, error)
            continue
        rows += 1
        yield location, parsed
    require_rows(file.name, rows, invalid, row_format)


def read_rows(
    rows: Iterable[tuple[Location, object]], row_format: RowFormat
) -> tuple[list[tuple[Location, ParsedRow]], list[tuple[Location, RowError]]]:
    """Parse rows; return the valid ones and the errors of the invalid ones, with their locations."""
    parsed, invalid = [], []
    for location, row in rows:
        try:
            parsed.append((location, row_format.parse(row)))
        except RowError as error:
            invalid.append((location, error))
    return parsed, invalid


def require_rows(name: str, rows: int, invalid: Invalid, row_format: RowFormat) -> None:
    """Refuse a file without rows, or with invalid ones: name the first and count the others."""
    if invalid.count:
        more = f" (invalid rows after it: {invalid.count - 1:,})" if invalid.count > 1 else ""
        raise LitLoraError(f"{invalid.first}{more}; a row must look like {row_format.shape}")
    if not rows:
        raise LitLoraError(f"{name} holds no rows; a row must look like {row_format.shape}")


def split(count: int, val_split_fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which rows are for training and for validation, as Lit-GPT splits them, so that losses are comparable.

    It calls torch's random_split. This gives the same result without torch, whose import takes seconds and 200 MB.
    """
    val_size = int(count * val_split_fraction)
    train_size = int(count * (1 - val_split_fraction))
    train_size, val_size = _with_remainder(train_size, val_size, count)
    if not val_size:  # rounding never leaves the training split empty
        raise LitLoraError(
            f"--val_split_fraction ({val_split_fraction}) leaves no row for validation ({count} in all); "
            "choose a larger fraction or add rows"
        )
    order = _permutation(count, seed)
    return order[:train_size], order[train_size:]


def _with_remainder(train_size: int, val_size: int, count: int) -> tuple[int, int]:
    """Share out what rounding down has left, one row each."""
    remainder = count - train_size - val_size
    return train_size + (remainder + 1) // 2, val_size + remainder // 2


def _permutation(count: int, seed: int) -> NDArray[np.int64]:
    """Return torch's randperm: Fisher-Yates with 32 bits of the Mersenne Twister for each swap."""
    numbers = np.random.RandomState(seed % 2**32).randint(0, 2**32, max(count - 1, 0), np.uint32)
    others = np.arange(len(numbers)) + numbers % np.arange(count, 1, -1)
    order = array("q", range(count))
    for position, other in enumerate(array("q", others.tobytes())):
        order[position], order[other] = order[other], order[position]
    return np.array(order)


def write_dataset(destination: Path, train: Lines, val: Lines, origin: Mapping[str, object]) -> None:
    """Write train.jsonl and val.jsonl from their lines, and dataset.json with their origin."""
    facts = {**origin, "rows": len(train) + len(val), "train": len(train), "val": len(val)}
    about = json.dumps(facts, ensure_ascii=False, indent=2) + "\n"
    lines = {
        TRAIN: train,
        VAL: val,
        ABOUT: [about.encode(errors="backslashreplace")],  # a file name need not be UTF-8
    }
    write_transaction(destination, lines)


def check_destination(destination: Path, sources: Sequence[Path]) -> None:
    """Refuse to overwrite one of the sources, or files that no prepare command has written."""
    present = [path for path in (destination / name for name in (TRAIN, VAL, ABOUT)) if path.exists()]
    hint = "choose another --destination_path"
    for source in sources:
        if any(source.exists() and path.samefile(source) for path in present):
            raise LitLoraError(f"the source {source} would be overwritten: {hint}")
    if present and not _is_prepared(destination / ABOUT):
        fault = f"{present[0]} was not written by litlora and would be overwritten"
        raise LitLoraError(f"{fault}: {hint}, or move it away")


def _is_prepared(about: Path) -> bool:
    with suppress(LitLoraError):
        return {"rows", "train", "val"} <= read_json(about).keys()
    return False
