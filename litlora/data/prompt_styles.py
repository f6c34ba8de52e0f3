"""Prompt styles: how an example becomes text, and which characters of it are supervised."""

import re
from dataclasses import dataclass
from typing import Protocol

from litlora.data.chat_template import ChatTemplate, refuse_template
from litlora.data.examples import Example
from litlora.errors import LitLoraError

ALPACA = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""
ALPACA_WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""


@dataclass(frozen=True)
class Rendered:
    """The text of an example, and its supervised spans [start, end): each response with its end token."""

    text: str
    supervised: tuple[tuple[int, int], ...]


class PromptStyle(Protocol):
    """Turns an example into text; training, validation and generation share it."""

    @property
    def name(self) -> str:
        """Return the value of --prompt_style, which is saved beside an adapter."""

    @property
    def add_special_tokens(self) -> bool:
        """Return whether the tokenizer adds BOS; a chat template writes it itself."""

    def prompt(self, instruction: str, input: str = "", system: str = "") -> str:
        """Return the text before the first response."""

    def render(self, example: Example) -> Rendered:
        """Return the text of all turns, each response followed by its end token."""


def build_prompt_style(name: str, *, bos_token: str | None, eos_token: str, chat_template: str | None) -> PromptStyle:
    """Return the style of this name; a name that contains {instruction} is itself the template."""
    if name == "chat":
        if chat_template is None:
            raise LitLoraError(
                "--prompt_style chat needs a checkpoint with a chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json), and this one has none; use alpaca, none, or a text with {instruction}"
            )
        return ChatStyle(ChatTemplate(chat_template, bos_token, eos_token), eos_token)
    if name == "alpaca":
        return TemplateStyle(name, ALPACA, ALPACA_WITH_INPUT, eos_token)
    template = "{instruction}" if name == "none" else name
    if "{instruction}" not in template:
        raise LitLoraError(
            f"--prompt_style ({name}) must be alpaca, none, chat, "
            "or a text with {instruction} and, if wanted, {input}"
        )
    with_input = template if "{input}" in template else template.replace("{instruction}", "{instruction}\n\n{input}", 1)
    return TemplateStyle(name, template, with_input, eos_token)


@dataclass(frozen=True)
class TemplateStyle:
    """A text with placeholders for instruction and input, repeated for each turn of a conversation."""

    name: str
    template: str
    template_with_input: str
    eos_token: str
    add_special_tokens: bool = True

    def prompt(self, instruction: str, input: str = "", system: str = "") -> str:
        values = {"instruction": f"{system}\n\n{instruction}" if system else instruction, "input": input}
        template = self.template_with_input if input else self.template
        # One pass, so that "{input}" in an instruction and all other braces stay unchanged
        return re.sub(r"\{(instruction|input)\}", lambda match: values[match[1]], template)

    def render(self, example: Example) -> Rendered:
        if example.text:
            return Rendered(example.text + self.eos_token, ((0, len(example.text + self.eos_token)),))
        _refuse_tools(example, self.name)
        text, system = "", example.system
        supervised = []
        responses = [message for message in example.messages if message.role == "assistant"]
        for turn, response in zip(example.turns, responses, strict=True):
            text += self.prompt(turn.instruction, turn.input, system)
            start, system = len(text), ""
            text += turn.output + self.eos_token
            if response.is_supervised:
                supervised.append((start, len(text)))
        return Rendered(text, tuple(supervised))


@dataclass(frozen=True)
class ChatStyle:
    """The checkpoint's own chat template."""

    template: ChatTemplate
    eos_token: str
    name: str = "chat"
    add_special_tokens: bool = False

    def prompt(self, instruction: str, input: str = "", system: str = "") -> str:
        messages = [*_system_message(system), _user_message(instruction, input)]
        return self.template.render(messages, add_generation_prompt=True)

    def render(self, example: Example) -> Rendered:
        text, end = "", 0
        supervised = []
        if example.text:
            return Rendered(example.text + self.eos_token, ((0, len(example.text + self.eos_token)),))
        _refuse_tools(example, self.name)
        messages: list[dict[str, object]] = []
        for message in example.messages:
            if message.role != "assistant":
                messages.append(message.to_chat())
                continue
            prompt = self.template.render(messages, add_generation_prompt=True)
            if not prompt.startswith(text[:end]):
                refuse_template("renders a response differently in a longer conversation, so it cannot train")
            messages.append({"role": "assistant", "content": message.text})
            text = self.template.render(messages, add_generation_prompt=False)
            if not text.startswith(prompt):
                refuse_template("renders a prompt differently before its response, so it cannot train")
            end = self._end_of_response(text, len(prompt), message.text.strip())
            if message.is_supervised:
                supervised.append((len(prompt), end))
        return Rendered(text, tuple(supervised))

    def _end_of_response(self, text: str, start: int, response: str) -> int:
        """Return the end of the EOS token after a response, or of the template's own end marker if it has another."""
        position = text.find(response, start)
        if position < 0:
            refuse_template("drops a part of the response, so it cannot train")
        response_end = position + len(response)
        eos = text.find(self.eos_token, response_end)
        end = len(text.rstrip()) if eos < 0 else eos + len(self.eos_token)
        if end <= response_end:
            refuse_template("writes nothing after a response, so a model could not learn where to stop")
        return end


def _refuse_tools(example: Example, style: str) -> None:
    if example.tools or any(message.tool_calls for message in example.messages):
        raise LitLoraError(f"--prompt_style {style} cannot render the tool calls of the data: leave these rows out")


def _system_message(system: str) -> list[dict[str, object]]:
    return [{"role": "system", "content": system}] if system else []


def _user_message(instruction: str, input: str) -> dict[str, object]:
    return {"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}
