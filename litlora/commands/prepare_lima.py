"""Prepare LIMA for fine-tuning."""

from dataclasses import replace
from functools import partial

from litlora.args.data import PrepareLimaArgs
from litlora.data.prepare import prepare
from litlora.data.readers.fields import Fields
from litlora.data.readers.parsers import RowError
from litlora.data.readers.row_formats import ParsedRow, RowFormat, parse_conversation

SHAPE = '{"conversations": ["question", "answer", ...]}'


def prepare_lima(args: PrepareLimaArgs) -> None:
    """Turn LIMA's conversations, or their first turns, into a prepared data set."""
    parse = partial(_parse_row, multiturn=args.include_multiturn_conversations)
    prepare(args, RowFormat(SHAPE, parse))


def _parse_row(row: object, multiturn: bool) -> ParsedRow:
    values = Fields.of(row).values
    texts = values.get("conversations")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RowError('there is no list of strings under "conversations"')
    selected = texts if multiturn else texts[:2]
    parsed = parse_conversation(Fields({**values, "conversations": selected}), "conversations")
    return parsed._replace(example=replace(parsed.example, is_chat=multiturn))  # else instructions, as in Lit-GPT
