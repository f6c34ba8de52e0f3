"""Examples: what every row of data becomes, whatever its format, and the JSON in which train.jsonl holds it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, Self

Role = Literal["system", "user", "assistant", "tool"]
Json = dict[str, object]


@dataclass(frozen=True)
class Turn:
    """One instruction, its optional input, and the response."""

    instruction: str
    output: str
    input: str = ""


@dataclass(frozen=True)
class ToolCall:
    """A call that an assistant's message makes."""

    name: str
    arguments: Json | str
    """The arguments by name; a text where the data has no JSON object."""
    id: str = ""

    def to_json(self) -> Json:
        """Return the call as OpenAI and chat templates have it."""
        function = {"name": self.name, "arguments": self.arguments}
        return ({"id": self.id} if self.id else {}) | {"type": "function", "function": function}


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str = ""
    input: str = ""
    """Alpaca's input, which prompt styles may place apart from the instruction; only in a user's message."""
    reasoning: str = ""
    """What the assistant thinks before its content, without the tags around it."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    """The call that a tool's message answers."""
    name: str = ""
    """The tool of a tool's message, or the author of another."""
    weight: Literal[0, 1] = 1
    """0 makes an assistant's message context, which is not supervised."""

    @property
    def is_supervised(self) -> bool:
        """Whether the message is learned."""
        return self.role == "assistant" and self.weight == 1

    @property
    def text(self) -> str:
        """The content after the reasoning, if any, for prompt styles that know no reasoning."""
        return f"<think>\n{self.reasoning}\n</think>\n\n{self.content}" if self.reasoning else self.content

    @property
    def question(self) -> str:
        """The content with the input below it."""
        return f"{self.content}\n\n{self.input}" if self.input else self.content

    def to_chat(self) -> Json:
        """Return the message as OpenAI and chat templates have it."""
        calls = [call.to_json() for call in self.tool_calls]
        extras = {
            "reasoning_content": self.reasoning,
            "tool_calls": calls,
            "tool_call_id": self.tool_call_id,
            "name": self.name,
        }
        return {"role": self.role, "content": self.question} | {key: value for key, value in extras.items() if value}

    def to_json(self) -> Json:
        """Return the message as train.jsonl holds it."""
        return self.to_chat() | ({} if self.weight else {"weight": 0})


@dataclass(frozen=True)
class Example:
    """One row of data: a conversation, or a plain text, all of which is supervised."""

    messages: tuple[Message, ...] = ()
    """The last one is the assistant's; roles come in any order. None with a plain text."""
    tools: tuple[Json, ...] = ()
    """The functions that the assistant may call, as OpenAI and chat templates have them."""
    text: str = ""
    """A plain text, for continued pre-training."""
    is_chat: bool = field(default=False, compare=False)
    """Whether its row is a list of messages, and not a question with its answer."""

    @classmethod
    def of(cls, *turns: Turn, system: str = "") -> Self:
        """Return the conversation with these turns."""
        return cls((*_system(system), *(message for turn in turns for message in _messages(turn))))

    @property
    def system(self) -> str:
        """The system messages at the beginning, joined."""
        return "\n\n".join(message.content for message in self.messages[: self._opening])

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation as turns: each response with all that was said since the one before it."""
        return tuple(self._turns()) if self.messages else (Turn("", self.text),)

    @property
    def _opening(self) -> int:
        return next((n for n, message in enumerate(self.messages) if message.role != "system"), len(self.messages))

    def _turns(self) -> Iterator[Turn]:
        said: list[Message] = []
        for message in self.messages[self._opening :]:
            if message.role != "assistant":
                said.append(message)
                continue
            instruction = "\n\n".join(earlier.content for earlier in said)
            yield Turn(instruction, message.text, "\n\n".join(earlier.input for earlier in said if earlier.input))
            said = []

    def to_json(self) -> Json:
        """Return the row that parses to this example."""
        if not self.messages:
            return {"text": self.text}
        if not self.is_chat and self._is_alpaca():
            return self._to_alpaca()
        if any(message.input for message in self.messages):
            raise ValueError(f"only the last of alternating messages can hold an input: {self}")
        row: Json = {"messages": [message.to_json() for message in self.messages]}
        return row | ({"tools": list(self.tools)} if self.tools else {})

    def _is_alpaca(self) -> bool:
        """Whether Alpaca's keys can hold all of it: turns in alternation, and an input in the last one only."""
        plain = Example.of(*self.turns, system=self.system)
        return self == replace(plain, tools=self.tools) and not any(turn.input for turn in self.turns[:-1])

    def _to_alpaca(self) -> Json:
        *history, last = self.turns
        pairs = [[turn.instruction, turn.output] for turn in history]
        extras = {"system": self.system, "history": pairs, "tools": list(self.tools)}
        row: Json = {"instruction": last.instruction, "input": last.input, "output": last.output}
        return row | {key: value for key, value in extras.items() if value}


def _messages(turn: Turn) -> tuple[Message, Message]:
    return Message("user", turn.instruction, turn.input), assistant(turn.output)


def _system(content: str) -> tuple[Message, ...]:
    return (Message("system", content),) if content else ()


def assistant(text: str) -> Message:
    """Return the assistant's message with this text; a <think> block at its beginning is the reasoning."""
    opening, closed, content = text.partition("</think>")
    reasoning = opening.lstrip().removeprefix("<think>")
    if not closed or reasoning == opening.lstrip() or not reasoning.strip():
        return Message("assistant", text)
    return Message("assistant", content.lstrip("\n"), reasoning=reasoning.strip("\n"))
