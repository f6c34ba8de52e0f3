"""Data sets as files: sources and prepared folders are read, split, and written as JSONL."""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import TypeVar

from litlora.data.examples import Example
from litlora.data.prompt_styles import AUTO
from litlora.data.readers import RawFile, RowError, jsonl_lines, jsonl_rows, open_file, parse_rows
from litlora.data.row_formats import ANY, ParsedRow, RowFormat
from litlora.data.row_store import Selection
from litlora.errors import LitLoraError
from litlora.utils.files import complete_transaction, read_json, write_transaction

TRAIN, VAL, ABOUT = "train.jsonl", "val.jsonl", "dataset.json"
Lines = list[bytes] | Selection
Location = TypeVar("Location")
Row = TypeVar("Row")
ROWS_FOR_STYLE = 100  # of the training split, which --prompt_style auto looks at


def read_examples(path: Path) -> list[Example]:
    """Read the examples of a prepared split."""
    return [example for _, example in read_located_examples(path)]


def read_located_examples(path: Path) -> list[tuple[str, Example]]:
    """Read the examples of a prepared split, each with the location of its row."""
    with open_split(path) as file:
        raw = RawFile.from_bytes(str(path), path.suffix, file.read())
    return [(location, row.example) for location, row in read_file(raw, ANY)]


def open_split(path: Path) -> BufferedReader:
    """Open a prepared split; LitLoraError with the command to prepare it if it is missing."""
    if (file := path.parent).is_file():
        command = f"litlora prepare_json --source {file} --destination_path FOLDER"
        raise LitLoraError(f"--data_dir ({file}) is a file; prepare a folder of it with: {command}")
    complete_transaction(path.parent)
    command = f"litlora prepare_json --source FILE --destination_path {path.parent}"
    return open_file(path, if_missing=f"no {path.name} in {path.parent}; prepare one with: {command}")


def read_example(path: Path, index: int, flag: str) -> Example:
    """Read one row of a prepared split, counted from 0, without reading the others unless it is invalid."""
    with open_split(path) as file:
        rows = jsonl_rows(jsonl_lines(file))
        _, row = next(islice(rows, index, None), (0, RowError()))
    with suppress(RowError):
        return ANY.parse(row).example
    count = len(read_examples(path))  # raises if a row is invalid
    raise LitLoraError(f"{flag} ({index}) must be below the number of rows in {path.name} ({count})")


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
            parsed.append((location, row_format.parse(row)))
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


def split(examples: Sequence[Row], val_split_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
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
