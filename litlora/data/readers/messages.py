"""The messages of a conversation as OpenAI, Anthropic and ShareGPT have them, with calls and reasoning."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Literal

from litlora.data.examples import Json, Message, Role, ToolCall, assistant
from litlora.data.readers.fields import Fields, check_json, checked_text
from litlora.data.readers.parsers import RowError, decode_json, json_type

REASONING = ("reasoning_content", "thinking", "reasoning")
CONTENT = ("content", "value", "text")
TEXT_PARTS = ("text", "input_text", "output_text")
PART_ROLES: dict[str, tuple[Role, ...]] = {
    "thinking": ("assistant",), "tool_use": ("assistant",), "tool_result": ("user", "tool"),
}  # fmt: skip
"""The roles of messages that can have content parts of a type; those of all others can be anybody's."""
CALLS = ("function_call", "tool_call")  # ShareGPT's roles of a message that is a call
ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "ai", "model", *CALLS), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
SHOWN_ROLES = "system, user, assistant or tool"


@dataclass
class Parts:
    """What the content of a message holds: a text, or what its parts are."""

    text: str = ""
    thinking: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)


def parse_messages(messages: object, key: str) -> tuple[list[Message], Sequence[str]]:
    """Return messages, and the keys that are left out; a list of texts alternates between user and assistant."""
    if not isinstance(messages, list):
        raise RowError(f'"{key}" is {json_type(messages)}, not a list')
    if messages and all(isinstance(message, str) for message in messages):
        turns = zip(cycle(("user", "assistant")), messages, strict=False)
        messages = [{"role": role, "content": text} for role, text in turns]
    parsed: list[Message] = []
    left_out = []
    for number, value in enumerate(messages, start=1):
        try:
            fields = Fields.of(value)
            parsed += _parse_message(fields)
        except RowError as error:
            raise RowError(f"message {number}: {error}") from error
        left_out += [f"{key}[].{name}" for name in fields.unused]
    return [message for message in parsed if message.role != "system" or message.content], left_out


def parse_system(fields: Fields) -> str:
    """Return the system prompt that a row has beside its messages; Anthropic also has it as a list of texts."""
    key = fields.find(("system", "system_prompt"))
    return "" if key is None else _parts_of(fields, key, "system").text


def _parse_message(fields: Fields) -> list[Message]:
    """Return a message; Anthropic has the results of tools as parts of a user's message, before its text."""
    name = fields.text("role", "from") or fields.required_text("role")
    role = ROLES.get(name.lower())
    if role is None:
        raise RowError(f"the role {reprlib.repr(name)} is not {SHOWN_ROLES}")
    if name in CALLS:
        return [_with_extras(Message(role, tool_calls=_calls(fields, "value", "content")), fields)]
    if role == "assistant":
        return [_with_extras(_parse_response(fields), fields)]
    parts = _content(fields, role)
    if parts.results and not parts.text:
        return parts.results
    said = Message(role, parts.text, tool_call_id=fields.text("tool_call_id"))
    return [*parts.results, _with_extras(said, fields)]


def _with_extras(message: Message, fields: Fields) -> Message:
    name, weight = fields.text("name"), _weight(fields, message.role)
    return replace(message, name=name, weight=weight) if name or not weight else message


def _parse_response(fields: Fields) -> Message:
    parts = _content(fields, "assistant")
    reasoning = fields.text(*REASONING) or parts.thinking
    if parts.thinking not in ("", reasoning):
        raise RowError("there is a reasoning beside the content, and another one among its parts")
    calls = (*parts.calls, *_calls(fields, "tool_calls", "function_call"))
    if fields.find(CONTENT) is None and not reasoning and not calls:
        raise RowError('"content" is null, not a string' if "content" in fields.values else 'there is no "content"')
    has_reasoning = reasoning.strip() != ""
    message = Message("assistant", parts.text, reasoning=reasoning) if has_reasoning else assistant(parts.text)
    return replace(message, tool_calls=calls) if calls else message


def _content(fields: Fields, role: Role) -> Parts:
    """Return the content of a message."""
    key = fields.find(CONTENT)
    if key is None:  # which some programs write for none, but a question is never empty
        return Parts() if role != "user" else Parts(fields.required_text("content"))
    return _parts_of(fields, key, role)


def _parts_of(fields: Fields, key: str, role: Role) -> Parts:
    """Return the text or the parts under a key, all of which a message of this role can have."""
    value, parts = fields.take(key), Parts()
    if not isinstance(value, list):
        return Parts(checked_text(value, key))
    for number, part in enumerate(value, start=1):
        kind = _add_part(fields, parts, number, part)
        if role not in PART_ROLES.get(kind, (role,)):
            raise RowError(f"content part {number} has the type {kind!r}, which no {role} message can have")
    return parts


def _add_part(message: Fields, parts: Parts, number: int, part: object) -> str:
    """Add a content part to the others, and return its type."""
    fields = Fields.of({"text": part} if isinstance(part, str) else part)
    kind = fields.text("type") or "text"
    if kind in TEXT_PARTS:
        parts.text += _inner_text(fields, "text")
    elif kind == "thinking":
        parts.thinking += _inner_text(fields, "thinking")
    elif kind == "tool_use":
        call = ToolCall(fields.required_text("name"), _arguments(fields, "input"), fields.text("id"))
        parts.calls.append(call)
    elif kind == "tool_result":
        answered = fields.text("tool_use_id")
        parts.results.append(Message("tool", _inner_text(fields, "content"), tool_call_id=answered))
    else:
        raise RowError(f"content part {number} has the type {reprlib.repr(kind)}, but only text can be read")
    message.left_out("content[]", fields)
    return kind


def _inner_text(fields: Fields, key: str) -> str:
    """Return the text under a key of a part, which may be a list of texts itself; the result of a tool may be none."""
    if fields.values.get(key) is None:
        return "" if key == "content" else fields.required_text(key)
    return _parts_of(fields, key, "system").text


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
    call = ToolCall(function.required_text("name"), _arguments(function, "arguments", "parameters"), fields.text("id"))
    message.left_out("tool_calls[]", fields)
    message.left_out("tool_calls[].function", function)
    return call


def _arguments(function: Fields, *keys: str) -> Json | str:
    """Return the arguments of a call by name, which OpenAI writes as a text."""
    arguments = function.take(*keys)
    check_json(arguments, "arguments")
    if isinstance(arguments, str):
        try:
            parsed = decode_json(arguments or "{}")
        except (ValueError, RecursionError):
            return arguments
        return parsed if isinstance(parsed, dict) else arguments
    if arguments is not None and not isinstance(arguments, dict):
        raise RowError(f"the arguments of a tool call are {json_type(arguments)}, not an object")
    return arguments or {}


def parse_tools(fields: Fields) -> tuple[Json, ...]:
    """Return the tools of a row, in OpenAI's form."""
    tools = fields.json("tools", "functions") or []
    if not isinstance(tools, list):
        raise RowError(f'"tools" is {json_type(tools)}, not a list')
    return tuple(_tool(tool) for tool in tools)


def _tool(tool: object) -> Json:
    if isinstance(tool, str):  # as Parquet files often have it
        try:
            tool = decode_json(tool)
        except ValueError:
            tool = None
    if not isinstance(tool, dict) or not isinstance(tool.get("function", tool), dict):
        raise RowError('a tool must be an object such as {"type": "function", "function": {"name": "..."}}')
    check_json(tool, "tools")
    if "function" in tool or "name" not in tool:
        return tool
    function = {"parameters" if key == "input_schema" else key: value for key, value in tool.items()}  # Anthropic's
    return {"type": "function", "function": function}
