"""The checkpoint's own chat template as a prompt style: what a server sends, and what the answer to it must be.

The prompt of an answer is the template's text of the messages before it, with the generation prompt. The completion is
what the template writes for the answer as the last message. Many templates write history otherwise than last messages:
there, each answer is a sequence of its own. Elsewhere all answers of a conversation share one sequence.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from litlora.data.examples import Example, Json, Message, ToolCall
from litlora.data.prompts.chat_template import ChatTemplateError
from litlora.data.prompts.rendered import NO_END, REASONING_LOST, SYSTEM_MOVED, TOOLS_LOST, Rendered
from litlora.data.prompts.template_process import IsolatedTemplate
from litlora.data.tokenizer_backend.special_tokens import SpecialTokens

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of one meaning in different templates
TAG = re.compile(r"<[^<>\s]{0,40}\Z")  # the beginning of a tag at the end of a text
OPEN_BLOCK = re.compile(r"<(\w+)>\s*\Z")  # a prompt that ends inside a block, such as <think>
PROBE = "QUESTION-PROBE", "ANSWER-PROBE", "SYSTEM-PROBE", "REASONING-PROBE"


class Completion(NamedTuple):
    """An answer in the template's words."""

    prompt: str
    text: str
    """What follows the prompt."""
    end: int
    """Where the end token of the answer ends, in `text`."""
    notes: frozenset[str]


@dataclass(frozen=True)
class ChatStyle:
    """The checkpoint's own chat template."""

    template: IsolatedTemplate
    special: SpecialTokens
    eos_token: str
    stops: frozenset[str] = frozenset()
    """The tokens at which generation stops, as the checkpoint has them."""
    name: str = "chat"
    add_special_tokens: bool = False  # the template writes BOS itself

    def prompt(self, instruction: str, input: str = "", system: str = "") -> Rendered:
        """Return what a server sends for a first question."""
        return self.conversation([*_system(system), Message("user", instruction, input)])

    def conversation(self, messages: Sequence[Message], tools: Sequence[Json] = ()) -> Rendered:
        """Return the text of messages up to the next answer."""
        chat = self._chat(self._placed(messages))
        return Rendered.of(self._text(chat, True, self.special.guard(list(tools)) or None))

    def render(self, example: Example) -> list[Rendered]:
        """Return the sequences of an example."""
        if example.text:
            text = self.special.guard(example.text) + self.eos_token
            return [Rendered.of(text, [(0, len(text))])]
        messages, tools = self._placed(example.messages), self.special.guard(list(example.tools)) or None
        chat = self._chat(messages)
        answers = [n for n, message in enumerate(messages) if message.is_supervised]
        completions = [self._complete(chat, n, messages[n], tools) for n in answers]
        sequences = _joined(completions) or [Rendered.of(self._text(chat, False, tools))]
        return [replace(each, notes=each.notes | self._notes(example, each.text)) for each in sequences]

    def _notes(self, example: Example, text: str) -> frozenset[str]:
        """Return what the template does to the system message and the tools of an example."""
        moved = not self.accepts_system and any(message.role == "system" for message in example.messages)
        names = [tool_name(tool) for tool in example.tools]
        lost = any(name not in text for name in names)
        return frozenset(({SYSTEM_MOVED} if moved else set()) | ({TOOLS_LOST} if lost else set()))

    @cached_property
    def accepts_system(self) -> bool:
        """Whether the template has a place for a system message."""
        question, _, system, _ = PROBE
        try:
            return system in self._text([_chat("system", system), _chat("user", question)], True, None)
        except ChatTemplateError:
            return not self._renders_question()  # a template that fails on anything shows its own words

    @cached_property
    def end_token(self) -> str | None:
        """The token with which the template ends an answer, where it is a single one."""
        question, answer, *_ = PROBE
        chat = [_chat("user", question), _chat("assistant", answer)]
        try:
            completion = self._complete(chat, 1, Message("assistant", answer), None)
        except ChatTemplateError:
            return None
        ends = self.special.trailing(completion.text[: completion.end])
        return completion.text[ends[-1][0] : ends[-1][1]] if ends else None

    @cached_property
    def _writes_reasoning(self) -> str:
        """How the template takes reasoning: as keys, as a block in the content, or not at all ("")."""
        question, answer, _, reasoning = PROBE
        message = Message("assistant", answer, reasoning=reasoning)
        for form in ("keys", "content"):
            try:
                text = self._text([_chat("user", question), _assistant(message, form)], False, None)
            except ChatTemplateError:
                continue
            if reasoning in text:
                return form
        return ""

    @cached_property
    def _takes_arguments_as_text(self) -> bool:
        """Whether the template reads the arguments of a call only as a JSON text, as OpenAI has them."""
        message = Message("assistant", tool_calls=(ToolCall(PROBE[1], {"a": 1}, "callprobe"),))
        calling = [_chat("user", PROBE[0]), _assistant(message, "")]
        return not self._holds(calling, PROBE[1]) and self._holds([calling[0], _with_text(calling[1])], PROBE[1])

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template reads a content only as a list of parts, as those of models for images do."""
        question, answer, *_ = PROBE
        chat = [_chat("user", question), _chat("assistant", answer)]
        return not self._holds(chat, answer) and self._holds(_as_parts(chat), answer)

    def _holds(self, chat: Sequence[Mapping[str, Any]], text: str) -> bool:
        try:
            return text in self.template.render(chat, add_generation_prompt=False, tools=self._default_tools)
        except ChatTemplateError:
            return False

    @cached_property
    def _default_tools(self) -> list[Any] | None:
        """What stands for no tools: None as in transformers, or an empty list where a template cannot bear that."""
        chat = [_chat("user", PROBE[0])]
        try:
            self.template.render(chat, add_generation_prompt=True)
        except ChatTemplateError:
            return []
        return None

    def _renders_question(self) -> bool:
        try:
            return PROBE[0] in self._text([_chat("user", PROBE[0])], True, None)
        except ChatTemplateError:
            return False

    def _text(self, chat: Sequence[Mapping[str, Any]], prompt: bool, tools: Sequence[Any] | None) -> str:
        tools = self._default_tools if tools is None else tools
        chat = _as_parts(chat) if self._takes_parts else chat
        return self.template.render(chat, add_generation_prompt=prompt, tools=tools)

    def _placed(self, messages: Sequence[Message]) -> list[Message]:
        """Move system messages in front of the first question, where the template has no place for them."""
        if self.accepts_system or all(message.role != "system" for message in messages):
            return list(messages)
        system = "\n\n".join(message.content for message in messages if message.role == "system")
        others = [message for message in messages if message.role != "system"]
        if others[0].role != "user":
            return [Message("user", system), *others]
        return [replace(others[0], content=f"{system}\n\n{others[0].content}"), *others[1:]]

    def _chat(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return messages as templates read them, with the special tokens in their texts marked."""
        form = self._writes_reasoning if any(message.reasoning for message in messages) else ""
        chat = [_assistant(m, form) if m.role == "assistant" else dict(m.to_chat()) for m in messages]
        if any(message.tool_calls for message in messages) and self._takes_arguments_as_text:
            chat = [_with_text(message) for message in chat]
        guarded: list[dict[str, Any]] = self.special.guard(chat)
        return guarded

    def _complete(
        self, chat: Sequence[Mapping[str, Any]], n: int, message: Message, tools: Sequence[Any] | None
    ) -> Completion:
        """Return prompt and completion of message `n`, an answer."""
        prompt = self._text(chat[:n], True, tools) if n else ""
        full = self._text(chat[: n + 1], False, tools)
        content, reasoning = (self.special.guard(text).strip() for text in (message.content, message.reasoning))
        start = len(prompt)
        if not full.startswith(prompt):
            start = self._start_of_answer(chat[: n + 1], prompt, full, content, tools)
        completion = _closed(prompt, full[start:], reasoning)
        notes = self._losses(completion, content, reasoning, message)
        text, end = self._ended(completion, content, chat, n, tools, full)
        if not self.special.trailing(text[:end]):
            notes |= {NO_END}
        return Completion(prompt, text, end, notes)

    def _start_of_answer(
        self, chat: Sequence[Mapping[str, Any]], prompt: str, full: str, content: str, tools: Sequence[Any] | None
    ) -> int:
        """Return where the answer starts in a text that continues otherwise than the generation prompt does."""
        *history, message = chat
        earlier = _common(self._text(history, False, tools), full) if history else 0
        start = max(_common(prompt, full), earlier)
        answer = self._position_of(message, history, full, content, tools)
        start = start if answer < 0 else min(start, answer)
        opening = full[start : max(answer, start)]  # which the prompt may end with as well
        return start + next((n for n in range(len(opening), 0, -1) if prompt.endswith(opening[:n])), 0)

    def _position_of(
        self,
        message: Mapping[str, Any],
        history: Sequence[Mapping[str, Any]],
        full: str,
        content: str,
        tools: Sequence[Any] | None,
    ) -> int:
        """Return the position of an answer's content in a text, or else of its first call; -1 if it has neither.

        A probe in place of the content tells it from an equal text in a question.
        """
        if not content:
            calls = message.get("tool_calls") or []
            return full.rfind(calls[0]["function"]["name"]) if calls else -1
        before = message["content"][: message["content"].rfind(content)]
        probed = self._text([*history, {**message, "content": before + PROBE[1]}], False, tools)
        position = probed.rfind(PROBE[1])
        return position if full.startswith(probed[: max(position, 0)] + content) else full.rfind(content)

    def _losses(self, completion: str, content: str, reasoning: str, message: Message) -> frozenset[str]:
        """Refuse a template that drops what the data has for an answer; without the reasoning, it is a finding."""
        if content not in completion:
            raise ChatTemplateError("drops a part of the response, so it cannot train")
        for call in message.tool_calls:
            if self.special.guard(call.name) not in completion:
                raise ChatTemplateError("drops the tool calls of a message, so it cannot train")
        return frozenset({REASONING_LOST} if reasoning not in completion else ())

    def _ended(
        self, text: str, content: str, chat: Sequence[Mapping[str, Any]], n: int, tools: Sequence[Any] | None, full: str
    ) -> tuple[str, int]:
        """Return a completion and the end of its end token, which is added where the template writes none."""
        if stops := [end for start, end in self.special.spans(text) if text[start:end] in self.stops]:
            return text, stops[0]
        first, last = text.find(content) + len(content), text.rfind(content) + len(content)
        if run := [span for span in self.special.trailing(text) if span[0] >= first]:
            return text, run[-1][1]
        if run := self.special.leading(text[last:]):
            return text, last + run[0][1]
        if text[last:].strip():  # words of its own
            return text, len(text.rstrip())
        opening = self._next_opening(chat, n, tools, full)
        return text + opening, len(text) + len(opening)

    def _next_opening(self, chat: Sequence[Mapping[str, Any]], n: int, tools: Sequence[Any] | None, full: str) -> str:
        """Return the token that opens the next message, for a template that ends an answer with nothing else."""
        following = chat[n + 1 : n + 2] or [_chat("user", PROBE[0])]
        try:
            longer = self._text([*chat[: n + 1], *following], False, tools)
        except ChatTemplateError:
            return self.eos_token
        rest = longer[len(full) :] if longer.startswith(full) else ""
        tokens = self.special.leading(rest)
        return rest[: tokens[0][1]] if tokens else self.eos_token


def _joined(completions: Sequence[Completion]) -> list[Rendered]:
    """Return completions as sequences; one whose prompt begins with the text before it continues that sequence."""
    sequences: list[Rendered] = []
    text, end, notes = "", -1, frozenset[str]()
    spans: list[tuple[int, int]] = []
    for completion in completions:
        if not (spans and completion.prompt.startswith(text[:end])):
            if spans:
                sequences.append(Rendered.of(text, spans, notes))
            spans, notes = [], frozenset()
        start = len(completion.prompt)
        text, end = completion.prompt + completion.text, start + completion.end
        spans.append((start, end))
        notes |= completion.notes
    return [*sequences, Rendered.of(text, spans, notes)] if spans else []


def _common(text: str, other: str) -> int:
    """Return the length of the common prefix, without the beginning of a tag: <think> and </think> both have a <."""
    length = next(
        (n for n, pair in enumerate(zip(text, other, strict=False)) if pair[0] != pair[1]), min(len(text), len(other))
    )
    tag = TAG.search(text[:length])
    return tag.start() if tag and length < len(text) else length


def _closed(prompt: str, completion: str, reasoning: str) -> str:
    """Return a completion that first closes the block with which the prompt ends, after the reasoning."""
    opened = OPEN_BLOCK.search(prompt)
    if opened is None or f"</{opened[1]}>" in completion:
        return completion
    return f"{reasoning}\n</{opened[1]}>\n\n{completion.lstrip()}"


def tool_name(tool: Mapping[str, Any]) -> str:
    """Return the name of a tool, as OpenAI has it."""
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, dict) else ""


def _system(content: str) -> list[Message]:
    return [Message("system", content)] if content else []


def _as_parts(chat: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose content is a list with one text."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with the arguments of its calls as JSON texts."""
    calls = [
        call | {"function": call["function"] | {"arguments": _json_text(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return message | {"tool_calls": calls} if calls else message


def _json_text(arguments: Json | str) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _chat(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _assistant(message: Message, form: str) -> dict[str, Any]:
    """Return an answer as templates read it, with its reasoning under all keys that they know or in its content."""
    fields = {key: value for key, value in message.to_chat().items() if key not in REASONING_KEYS}
    if message.reasoning and form == "content":
        return fields | {"content": f"<think>\n{message.reasoning}\n</think>\n\n{message.content}"}
    return fields | (dict.fromkeys(REASONING_KEYS, message.reasoning) if message.reasoning else {})
