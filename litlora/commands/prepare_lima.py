"""Prepare LIMA for fine-tuning."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from litlora.args import PrepareLimaArgs
from litlora.data.prepare import fetch, prepare
from litlora.data.readers import PARSERS, RawFile, RowError
from litlora.data.row_formats import Fields, ParsedRow, RowFormat, parse_conversation
from litlora.hub.download import REPO_ID, fetch_dataset_file

SHAPE = '{"conversations": ["question", "answer", ...]}'


def prepare_lima(args: PrepareLimaArgs) -> None:
    """Turn LIMA's conversations, or their first turns, into a prepared data set."""
    parse = partial(_parse_row, multiturn=args.include_multiturn_conversations)
    prepare(args, _fetch(args), RowFormat(SHAPE, parse))


def _fetch(args: PrepareLimaArgs) -> RawFile:
    if not _names_dataset(args.source):
        return fetch(args.source)
    token = args.access_token.get_secret_value() if args.access_token else None
    path = fetch_dataset_file(args.source, "train.jsonl", token)
    return replace(RawFile.from_path(path, ""), name=f"{args.source}/train.jsonl")


def _names_dataset(source: str) -> bool:
    """Return whether `source` is ORG/NAME of the Hub and not a file, which may be missing."""
    path = Path(source)
    is_file = path.exists() or path.suffix.lower() in PARSERS
    return not is_file and REPO_ID.fullmatch(source) is not None


def _parse_row(row: object, multiturn: bool) -> ParsedRow:
    values = Fields.of(row).values
    texts = values.get("conversations")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RowError('there is no list of strings under "conversations"')
    selected = texts if multiturn else texts[:2]
    return parse_conversation(Fields({**values, "conversations": selected}), "conversations")
