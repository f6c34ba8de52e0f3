"""The formats of rows: which keys each has, and how they become an example.

Each key of a row is used, or named as left out, or the row is refused.
"""

import json
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from typing import Any, Literal, NamedTuple, Self

from litlora.data.examples import Example, Json, Message, Role, ToolCall, assistant
from litlora.data.readers.parsers import RowError, json_type
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
REASONING = ("reasoning_content", "thinking")
CONTENT = ("content", "value", "text")
PARTS = {"text": "text", "input_text": "text", "output_text": "text", "thinking": "thinking"}
"""Types of content parts, and the key that holds the text of each."""
CALLS = ("function_call", "tool_call")  # ShareGPT's roles of a message that is a call
ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "ai", "model", *CALLS), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
KEYS = frozenset((*CONVERSATIONS, "text", *(name for pair in PAIRS for name in pair)))
"""Keys by which a row is recognized."""
SHOWN_ROLES = "system, user, assistant or tool"


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


@dataclass
class Fields:
    """The keys of a JSON object, and those with a value that are not used yet."""

    values: Mapping[str, object]
    unused: dict[str, None] = field(init=False)  # in the order of the object

    def __post_init__(self) -> None:
        self.unused = {key: None for key, value in self.values.items() if not _is_empty(value)}

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
            if value is not None and not _is_empty(value):
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
        return _checked_text(self.values[name], name)

    def json(self, *names: str) -> Any:
        """Return the value under the first of these keys that has one, parsed if it is a text, as in CSV files."""
        name, value = self.find(names), self.take(*names)
        if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
            return value or None
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f'"{name}" is a text that is not valid JSON ({error})') from error

    def left_out(self, key: str, inner: "Fields") -> None:
        """Add the unused keys of an object under `key`."""
        self.unused |= {f"{key}.{name}": None for name in inner.unused}


def _is_empty(value: object) -> bool:
    """Return whether a value says nothing, so that nothing is lost with it."""
    return value is None or value == "" or value == [] or value == {}


def _checked_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f'"{name}" is {json_type(value)}, not a string')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise RowError(f'"{name}" holds {half}, an unpaired surrogate, which UTF-8 cannot encode') from error
    return value


def _check_json(value: object, name: str) -> None:
    """Refuse what train.jsonl cannot hold, such as an unpaired surrogate, or a date from a Parquet file."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f'"{name}" holds what JSON in UTF-8 cannot ({error})') from error


def _parse_any(row: object) -> ParsedRow:
    return _parse_fields(Fields.of(row))


def _parse_fields(fields: Fields) -> ParsedRow:
    if not KEYS & fields.values.keys() and (renamed := _in_small_letters(fields)):
        return _parse_fields(renamed)
    if name := fields.find(CONVERSATIONS):
        return parse_conversation(fields, name)
    if pair := _find_pair(fields):
        return _parse_pair(fields, *pair)
    if "text" in fields.values:
        return _parse_text(fields)
    raise RowError(f"the keys {reprlib.repr(list(fields.values))} match no row format, and no --columns assigns them")


def _in_small_letters(fields: Fields) -> Fields | None:
    """Return a row whose keys are such as Question and Answer with the keys of a format, if that makes it one."""
    values = {key.lower(): value for key, value in fields.values.items()}
    return Fields(values) if KEYS & values.keys() and len(values) == len(fields.values) else None


def _find_pair(fields: Fields) -> tuple[str, str] | None:
    """Return the names of the first pair that is there, or else of one that is there in part."""
    complete = (pair for pair in PAIRS if all(fields.values.get(name) is not None for name in pair))
    has_text = fields.find(["text"])
    likely = (pair for pair in PAIRS if pair[0] != "input" and not has_text)
    partial = (pair for pair in likely if any(name in fields.values for name in pair))
    return next(complete, None) or next(partial, None)


def _parse_alpaca(row: object) -> ParsedRow:
    return _parse_pair(Fields.of(row), "instruction", "output")


def _parse_pair(fields: Fields, question: str, answer: str) -> ParsedRow:
    """Parse a question and its answer, each a text or, as TRL has it, a list of messages."""
    prompt, messages_left_out = _prompt(fields, question)
    completion, more_left_out = _completion(fields, answer)
    messages = [*_history(fields), *prompt, *completion]
    is_chat = isinstance(fields.values[question], list) or isinstance(fields.values[answer], list)
    if is_chat:
        messages = [replace(message, content=message.question, input="") for message in messages]
    return _row(fields, messages, (*messages_left_out, *more_left_out), is_chat=is_chat)


def _prompt(fields: Fields, key: str) -> tuple[list[Message], Sequence[str]]:
    if _holds_messages(fields, key):
        messages, left_out = _parse_messages(fields.take(key), key)
        return [replace(message, weight=0) if message.is_supervised else message for message in messages], left_out
    return [Message("user", fields.required_text(key), "" if key == "input" else fields.text("input", "context"))], ()


def _holds_messages(fields: Fields, key: str) -> bool:
    """Tell whether a question or an answer is a list of messages; one of texts is a column of several rows."""
    value = fields.values.get(key)
    return isinstance(value, list) and not any(isinstance(each, str) for each in value)


def _completion(fields: Fields, key: str) -> tuple[list[Message], Sequence[str]]:
    if _holds_messages(fields, key):
        return _parse_messages(fields.take(key), key)
    content, reasoning = fields.required_text(key), fields.text(*REASONING)
    message = Message("assistant", content, reasoning=reasoning) if reasoning.strip() else None
    return [assistant(message.text if message else content)], ()


def _history(fields: Fields) -> Iterator[Message]:
    """Yield the earlier turns of a row, each a list of a question and its answer."""
    turns = fields.json("history") or []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise RowError('"history" must be a list of lists, each of a question and its answer')
    for question, answer in turns:
        yield Message("user", _checked_text(question, "history"))
        yield assistant(_checked_text(answer, "history"))


def _parse_text(fields: Fields) -> ParsedRow:
    if not (text := fields.required_text("text")):
        raise RowError('"text" is empty')
    return ParsedRow(Example(text=text), left_out=tuple(fields.unused))


def parse_conversation(fields: Fields, key: str) -> ParsedRow:
    """Parse a row whose messages are under `key`."""
    messages, left_out = _parse_messages(fields.json(key) or [], key)
    return _row(fields, messages, left_out, is_chat=True)


def _row(fields: Fields, messages: Sequence[Message], left_out: Sequence[str], *, is_chat: bool) -> ParsedRow:
    """Return a row with what the formats share: a system prompt, tools, and the keys that nobody has used."""
    system = fields.text("system", "system_prompt")
    opening = [Message("system", system)] if system else []
    last = max((n for n, message in enumerate(messages, start=1) if message.role == "assistant"), default=0)
    if not last:
        raise RowError("the conversation has no response")
    example = Example((*opening, *messages[:last]), _tools(fields), is_chat=is_chat)
    return ParsedRow(example, last < len(messages), (*fields.unused, *dict.fromkeys(left_out)))


def _tools(fields: Fields) -> tuple[Json, ...]:
    tools = fields.json("tools", "functions") or []
    if not isinstance(tools, list):
        raise RowError(f'"tools" is {json_type(tools)}, not a list')
    return tuple(_tool(tool) for tool in tools)


def _tool(tool: object) -> Json:
    if isinstance(tool, str):  # as Parquet files often have it
        try:
            tool = json.loads(tool)
        except ValueError:
            tool = None
    if not isinstance(tool, dict) or not isinstance(tool.get("function", tool), dict):
        raise RowError('a tool must be an object such as {"type": "function", "function": {"name": "..."}}')
    _check_json(tool, "tools")
    return tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}


def _parse_messages(messages: object, key: str) -> tuple[list[Message], Sequence[str]]:
    """Return messages, and the keys that are left out; a list of texts alternates between user and assistant."""
    if not isinstance(messages, list):
        raise RowError(f'"{key}" is {json_type(messages)}, not a list')
    if messages and all(isinstance(message, str) for message in messages):
        turns = zip(cycle(("user", "assistant")), messages, strict=False)
        messages = [{"role": role, "content": text} for role, text in turns]
    parsed, left_out = [], []
    for number, value in enumerate(messages, start=1):
        try:
            fields = Fields.of(value)
            parsed.append(_parse_message(fields))
        except RowError as error:
            raise RowError(f"message {number}: {error}") from error
        left_out += [f"{key}[].{name}" for name in fields.unused]
    return [message for message in parsed if message.role != "system" or message.content], left_out


def _parse_message(fields: Fields) -> Message:
    name = fields.text("role", "from") or fields.required_text("role")
    role = ROLES.get(name.lower())
    if role is None:
        raise RowError(f"the role {reprlib.repr(name)} is not {SHOWN_ROLES}")
    if name in CALLS:
        message = Message(role, tool_calls=_calls(fields, "value", "content"))
    elif role == "assistant":
        message = _parse_response(fields)
    else:
        message = Message(role, _content(fields, role)[0], tool_call_id=fields.text("tool_call_id"))
    name, weight = fields.text("name"), _weight(fields, role)
    return replace(message, name=name, weight=weight) if name or not weight else message


def _parse_response(fields: Fields) -> Message:
    content, part = _content(fields, "assistant")
    reasoning = fields.text(*REASONING, "reasoning") or part
    calls = _calls(fields, "tool_calls", "function_call")
    if fields.find(CONTENT) is None and not reasoning and not calls:
        raise RowError('"content" is null, not a string' if "content" in fields.values else 'there is no "content"')
    message = Message("assistant", content, reasoning=reasoning) if reasoning.strip() else assistant(content)
    return replace(message, tool_calls=calls) if calls else message


def _content(fields: Fields, role: Role) -> tuple[str, str]:
    """Return the text of a message, and the reasoning among its parts."""
    key = fields.find(CONTENT)
    if key is None:  # which some programs write for none, but a question is never empty
        return ("", "") if role != "user" else (fields.required_text("content"), "")
    value = fields.take(key)
    if not isinstance(value, list):
        return _checked_text(value, key), ""
    parts = [_parse_part(fields, number, part) for number, part in enumerate(value, start=1)]
    contents = ["".join(text for kind, text in parts if kind == wanted) for wanted in ("text", "thinking")]
    return contents[0], contents[1]


def _parse_part(message: Fields, number: int, part: object) -> tuple[str, str]:
    """Return the kind and the text of a content part."""
    if isinstance(part, str):
        return "text", _checked_text(part, "content")
    fields = Fields.of(part)
    kind = fields.text("type") or "text"
    if kind not in PARTS:
        raise RowError(f"content part {number} has the type {reprlib.repr(kind)}, but only text can be read")
    value = fields.take(PARTS[kind])
    message.left_out("content[]", fields)
    return PARTS[kind], _content(Fields({"content": value}), "user")[0]


def _weight(fields: Fields, role: Role) -> Literal[0, 1]:
    """Return whether a message is supervised; a weight of 1 on another's than the assistant's is left out."""
    weights = {name: fields.values.get(name) for name in ("weight", "train")}
    for name, weight in weights.items():
        if weight not in (None, 0, 1):
            raise RowError(f'"{name}" is {reprlib.repr(weight)}, but it must be 1 (supervised) or 0 (context)')
        if role == "assistant" or weight == 0:
            fields.take(name)
    return 0 if role == "assistant" and 0 in weights.values() else 1


def _calls(message: Fields, *keys: str) -> tuple[ToolCall, ...]:
    """Return the calls under the first of these keys that has any, a list or a single one."""
    value = message.json(*keys)
    calls = value if isinstance(value, list) else [value] if value else []
    return tuple(_call(message, call) for call in calls)


def _call(message: Fields, value: object) -> ToolCall:
    fields = Fields.of(value)
    function = Fields.of(fields.take("function")) if fields.find(["function"]) else fields
    fields.take("type")
    call = ToolCall(function.required_text("name"), _arguments(function), fields.text("id"))
    message.left_out("tool_calls[]", fields)
    message.left_out("tool_calls[].function", function)
    return call


def _arguments(function: Fields) -> Json | str:
    """Return the arguments of a call by name, which OpenAI writes as a text."""
    arguments = function.take("arguments", "parameters")
    _check_json(arguments, "arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return arguments
        return parsed if isinstance(parsed, dict) else arguments
    if arguments is not None and not isinstance(arguments, dict):
        raise RowError(f"the arguments of a tool call are {json_type(arguments)}, not an object")
    return arguments or {}


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
