"""The formats of rows: which keys each has, and how they become an example.

Each key of a row is used, or named as left out, or the row is refused.
"""

import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from litlora.data.examples import Example, Message, assistant
from litlora.data.readers.fields import NUMPY_HINT, Fields, checked_text, from_python
from litlora.data.readers.messages import REASONING, ROLES, parse_messages, parse_system, parse_tools
from litlora.data.readers.parsers import RowError, decode_json
from litlora.errors import LitLoraError

CONVERSATIONS = ("messages", "conversations", "conversation")
PAIRS = (
    ("instruction", "output"), ("prompt", "completion"), ("instruction", "response"), ("prompt", "response"),
    ("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer"),
    ("problem", "solution"), ("question", "solution"), ("instruction", "completion"), ("instruction", "answer"),
    ("prompt", "answer"), ("prompt", "output"), ("user", "assistant"),
    ("inputs", "targets"), ("input", "target"), ("input", "output"),
)  # fmt: skip
"""Names of a question and its answer, the most specific first."""
KEYS = frozenset((*CONVERSATIONS, "text", *(name for pair in PAIRS for name in pair)))
"""Keys by which a row is recognized."""
NUMPY_MESSAGES = re.compile(r"\[\{'(role|from|content|value)': ")


class ParsedRow(NamedTuple):
    """The example in a row, and what of the row is not part of it."""

    example: Example
    is_unanswered: bool = False
    """Whether messages after the last response, which teach nothing, are left out."""
    left_out: tuple[str, ...] = ()
    """Keys with a value that no format knows."""


class RowFormat(NamedTuple):
    """How rows are parsed, and what they look like, for error messages."""

    shape: str
    parse: Callable[[object], ParsedRow]


def _parse_any(row: object) -> ParsedRow:
    return _parse_fields(Fields.of(row))


def _parse_fields(fields: Fields) -> ParsedRow:
    if not KEYS & fields.values.keys() and (renamed := _in_small_letters(fields)):
        return _parse_fields(renamed)
    if name := fields.find(CONVERSATIONS):
        return parse_conversation(fields, name)
    pair = _find_pair(fields)
    if fields.values.keys() >= {"chosen", "rejected"} and (pair is None or not _is_complete(fields, pair)):
        what = '"chosen" and "rejected" are a preference, and only one answer can be learned'
        raise RowError(f"{what}: --columns {_columns_of_chosen(fields)} takes the chosen ones")
    if pair:
        return _parse_pair(fields, *pair)
    if "text" in fields.values:
        return _parse_text(fields)
    raise RowError(f"the keys {reprlib.repr(list(fields.values))} match no row format, and no --columns assigns them")


def _columns_of_chosen(fields: Fields) -> str:
    """Return --columns for the chosen answers, which are whole conversations where they begin with a question."""
    chosen = fields.values["chosen"]
    first = chosen[0] if isinstance(chosen, list) and chosen else None
    is_answer = isinstance(first, dict) and ROLES.get(str(first.get("role")).lower()) == "assistant"
    is_whole = first is not None and not is_answer
    return "messages=chosen" if is_whole or "prompt" not in fields.values else "instruction=prompt,output=chosen"


def _in_small_letters(fields: Fields) -> Fields | None:
    """Return a row whose keys are such as Question and Answer with the keys of a format, if that makes it one."""
    values = {key.lower(): value for key, value in fields.values.items()}
    return Fields(values) if KEYS & values.keys() and len(values) == len(fields.values) else None


def _find_pair(fields: Fields) -> tuple[str, str] | None:
    """Return the names of the first pair that is there, or else of one that is there in part."""
    complete = (pair for pair in PAIRS if _is_complete(fields, pair))
    has_text = fields.find(["text"])
    likely = (pair for pair in PAIRS if pair[0] != "input" and not has_text)
    partial = (pair for pair in likely if any(name in fields.values for name in pair))
    return next(complete, None) or next(partial, None)


def _is_complete(fields: Fields, pair: tuple[str, str]) -> bool:
    return all(fields.values.get(name) is not None for name in pair)


def _parse_alpaca(row: object) -> ParsedRow:
    return _parse_pair(Fields.of(row), "instruction", "output")


def _parse_pair(fields: Fields, question: str, answer: str) -> ParsedRow:
    """Parse a question and its answer, each a text or, as TRL has it, a list of messages."""
    fields = _with_lists(fields, question, answer)
    prompt, messages_left_out = _prompt(fields, question)
    completion, more_left_out = _completion(fields, answer)
    messages = [*_history(fields), *prompt, *completion]
    is_chat = isinstance(fields.values[question], list) or isinstance(fields.values[answer], list)
    if is_chat:
        messages = [replace(message, content=message.question, input="") for message in messages]
    return _row(fields, messages, (*messages_left_out, *more_left_out), is_chat=is_chat)


def _with_lists(fields: Fields, question: str, answer: str) -> Fields:
    """Return the fields of a row in which a text is a list of messages, as in a CSV file, with that list."""
    lists = {key: _messages_in(key, fields.values.get(key)) for key in (question, answer)}
    found = {key: messages for key, messages in lists.items() if messages}
    return Fields({**fields.values, **found}) if question in found else fields


def _messages_in(key: str, text: object) -> list[object] | None:
    """Return the messages in a text that holds nothing else."""
    if not isinstance(text, str) or not text.startswith("[{"):
        return None
    try:
        found = decode_json(text)
    except (ValueError, RecursionError):
        found = from_python(text)
        if found is None and NUMPY_MESSAGES.match(text):
            raise RowError(f'"{key}" is a list of messages as numpy writes it: {NUMPY_HINT}') from None
    return found if isinstance(found, list) and all(_is_message(each) for each in found) else None


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and not {"role", "from"}.isdisjoint(value)


def _prompt(fields: Fields, key: str) -> tuple[list[Message], Sequence[str]]:
    if _holds_messages(fields, key):
        messages, left_out = parse_messages(fields.take(key), key)
        return [replace(message, weight=0) if message.is_supervised else message for message in messages], left_out
    return [Message("user", fields.required_text(key), "" if key == "input" else fields.text("input", "context"))], ()


def _holds_messages(fields: Fields, key: str) -> bool:
    """Tell whether a question or an answer is a list of messages; one of texts is a column of several rows."""
    value = fields.values.get(key)
    return isinstance(value, list) and not any(isinstance(each, str) for each in value)


def _completion(fields: Fields, key: str) -> tuple[list[Message], Sequence[str]]:
    if _holds_messages(fields, key):
        return parse_messages(fields.take(key), key)
    content, reasoning = fields.required_text(key), fields.text(*REASONING)
    message = Message("assistant", content, reasoning=reasoning) if reasoning.strip() else None
    return [assistant(message.text if message else content)], ()


def _history(fields: Fields) -> Iterator[Message]:
    """Yield the earlier turns of a row, each a list of a question and its answer."""
    turns = fields.json("history") or []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise RowError('"history" must be a list of lists, each of a question and its answer')
    for question, answer in turns:
        yield Message("user", checked_text(question, "history"))
        yield assistant(checked_text(answer, "history"))


def _parse_text(fields: Fields) -> ParsedRow:
    if not (text := fields.required_text("text")):
        raise RowError('"text" is empty')
    return ParsedRow(Example(text=text), left_out=tuple(fields.unused))


def parse_conversation(fields: Fields, key: str) -> ParsedRow:
    """Parse a row whose messages are under `key`."""
    messages, left_out = parse_messages(fields.json(key) or [], key)
    return _row(fields, messages, left_out, is_chat=True)


def _row(fields: Fields, messages: Sequence[Message], left_out: Sequence[str], *, is_chat: bool) -> ParsedRow:
    """Return a row with what the formats share: a system prompt, tools, and the keys that nobody has used."""
    system = parse_system(fields)
    opening = [Message("system", system)] if system else []
    last = max((n for n, message in enumerate(messages, start=1) if message.role == "assistant"), default=0)
    if not last:
        raise RowError("the conversation has no response")
    example = Example((*opening, *messages[:last]), parse_tools(fields), is_chat=is_chat)
    return ParsedRow(example, last < len(messages), (*fields.unused, *dict.fromkeys(left_out)))


def _parse_prompt(row: object) -> ParsedRow:
    """Parse a row whose last answer may be missing: it is empty then."""
    values = dict(Fields.of(row).values)
    if name := Fields(values).find(CONVERSATIONS):
        values[name] = _answered(Fields(values).json(name))
    elif pair := _find_pair(Fields(values)):
        values[pair[1]] = "" if values.get(pair[1]) is None else values[pair[1]]
    parsed = _parse_fields(Fields(values))
    if not any(message.content or message.input for message in parsed.example.messages[:-1]):
        raise RowError("the prompt is empty" if parsed.example.messages else "a plain text has no prompt")
    return parsed


def _answered(messages: Any) -> Any:
    """Return messages that end with an answer."""
    if not isinstance(messages, list) or not messages:
        return messages
    last = messages[-1]
    if isinstance(last, str):  # which alternate
        return [*messages, ""] if len(messages) % 2 else messages
    role = str(last.get("role", last.get("from"))).lower() if isinstance(last, dict) else ""
    return messages if ROLES.get(role) == "assistant" else [*messages, {"role": "assistant", "content": ""}]


COLUMNS = (
    "instruction", "input", "output", "system", "history", "reasoning_content", "tools", "text", "messages",
)  # fmt: skip
"""Keys that columns of other names can stand for."""


def with_columns(columns: Mapping[str, str]) -> RowFormat:
    """Return the format of rows in which a key has the value of the column that `columns` gives for it."""
    for name in columns:
        if name not in COLUMNS:
            raise LitLoraError(f"--columns {name}=... is none of {', '.join(COLUMNS)}")
    shape = json.dumps(dict.fromkeys(columns.values(), "..."), ensure_ascii=False)
    return RowFormat(shape, partial(_parse_columns, columns))


def _parse_columns(columns: Mapping[str, str], row: object) -> ParsedRow:
    """Parse a row by the format that its renamed keys have; their own names would be others."""
    values = Fields.of(row).values
    for column in columns.values():
        if column not in values:
            raise RowError(f"there is no {json.dumps(column, ensure_ascii=False)}")
    taken = (*columns.values(), *columns)
    fields = Fields({**{key: value for key, value in values.items() if key not in taken},
                     **{name: values[column] for name, column in columns.items()}})  # fmt: skip
    parsed = _parse_renamed(fields, columns)
    hidden = [key for key in columns if key in values and key not in columns.values()]
    return parsed._replace(left_out=(*parsed.left_out, *hidden))


def _parse_renamed(fields: Fields, columns: Mapping[str, str]) -> ParsedRow:
    if "messages" in columns:
        return parse_conversation(fields, "messages")
    if "text" in columns:
        return _parse_text(fields)
    is_pair = "instruction" in columns or "output" in columns
    return _parse_pair(fields, "instruction", "output") if is_pair else _parse_fields(fields)


_ALPACA_SHAPE = '{"instruction": "...", "input": "...", "output": "..."}'
_MESSAGES_SHAPE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
ALPACA = RowFormat(_ALPACA_SHAPE, _parse_alpaca)
ANY = RowFormat(f'{_ALPACA_SHAPE}, {{"prompt": "...", "completion": "..."}} or {_MESSAGES_SHAPE}', _parse_any)
PROMPT = RowFormat(
    '{"prompt": "..."}, {"instruction": "...", "input": "..."} or {"messages": [{"role": "user", "content": "..."}]}',
    _parse_prompt,
)
"""Rows that are to be completed, with or without an answer, which is not read."""
