"""Prompt styles: how an example becomes text, and which characters of it are supervised."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from litlora.data.examples import Example, Json, Message
from litlora.data.prompts.chat_style import ChatStyle
from litlora.data.prompts.rendered import Rendered
from litlora.data.prompts.template_process import IsolatedTemplate
from litlora.data.tokenizer_backend.special_tokens import SpecialTokens
from litlora.errors import LitLoraError

AUTO = "auto"
PLACEHOLDER = re.compile(r"\{([A-Za-z_]+)\}")
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
class StyleSettings:
    """What the user sets about prompts: --prompt_style and the variables of a chat template."""

    name: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    """The day that a chat template writes as today's, such as 2026-01-31; None for today's."""

    @classmethod
    def of(cls, style: "StyleSettings | str") -> "StyleSettings":
        """Return the settings of a style by its name."""
        return cls(style) if isinstance(style, str) else style


@dataclass(frozen=True)
class StyleTokens:
    """What a checkpoint's tokenizer files say about prompts."""

    eos_token: str
    named: Mapping[str, str | None]
    """The special tokens by the names that chat templates have for them, such as bos_token."""
    special: SpecialTokens
    stops: frozenset[str]
    chat_template: str | None


class PromptStyle(Protocol):
    """Turns an example into text; training, validation and generation share it."""

    @property
    def name(self) -> str:
        """Return the value of --prompt_style, which is saved beside an adapter."""

    @property
    def add_special_tokens(self) -> bool:
        """Return whether the tokenizer adds BOS; a chat template writes it itself."""

    @property
    def end_token(self) -> str | None:
        """Return the token that ends a response, where it is a single one."""

    def prompt(self, instruction: str, input: str = "", system: str = "") -> Rendered:
        """Return the text before the first response."""

    def conversation(self, messages: Sequence[Message], tools: Sequence[Json] = ()) -> Rendered:
        """Return the text of messages up to the next response."""

    def render(self, example: Example) -> list[Rendered]:
        """Return the sequences of an example, in which each response is followed by its end token."""


def build_prompt_style(settings: StyleSettings, tokens: StyleTokens) -> PromptStyle:
    """Return the style of these settings; a name that contains {instruction} is itself the template."""
    name = settings.name
    if settings.variables and name != "chat":
        raise LitLoraError(f"--prompt_style_variables are for --prompt_style chat, not for {name}: leave them out")
    if name == "chat":
        return _chat_style(settings, tokens)
    if name == "alpaca":
        return TemplateStyle(name, ALPACA, ALPACA_WITH_INPUT, tokens.eos_token, tokens.special)
    template = "{instruction}" if name == "none" else name.replace("\\n", "\n")
    if "{instruction}" not in template:
        raise LitLoraError(
            f"--prompt_style ({name}) must be auto, alpaca, none, chat, "
            "or a text with {instruction} and, if wanted, {input}"
        )
    if unknown := [found for found in PLACEHOLDER.findall(template) if found not in ("instruction", "input")]:
        raise LitLoraError(f"--prompt_style: {{{unknown[0]}}} has no meaning: there are {{instruction}} and {{input}}")
    with_input = template if "{input}" in template else template.replace("{instruction}", "{instruction}\n\n{input}", 1)
    return TemplateStyle(name, template, with_input, tokens.eos_token, tokens.special)


def _chat_style(settings: StyleSettings, tokens: StyleTokens) -> ChatStyle:
    if tokens.chat_template is None:
        raise LitLoraError(
            "--prompt_style chat needs a checkpoint with a chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json), and this one has none; use alpaca, none, or a text with {instruction}"
        )
    try:
        date = datetime.fromisoformat(settings.date) if settings.date else None
    except ValueError as error:
        raise LitLoraError(f"the date of the chat template ({settings.date}) must look like 2026-01-31") from error
    named = {**tokens.named, "eos_token": tokens.eos_token}
    template = IsolatedTemplate(tokens.chat_template, named, settings.variables, date)
    return ChatStyle(template, tokens.special, tokens.eos_token, tokens.stops)


@dataclass(frozen=True)
class TemplateStyle:
    """A text with placeholders for instruction and input, repeated for each turn of a conversation."""

    name: str
    template: str
    template_with_input: str
    eos_token: str
    special: SpecialTokens
    add_special_tokens: bool = True

    @property
    def end_token(self) -> str:
        return self.eos_token

    def prompt(self, instruction: str, input: str = "", system: str = "") -> Rendered:
        return Rendered.of(self._prompt(instruction, input, system))

    def conversation(self, messages: Sequence[Message], tools: Sequence[Json] = ()) -> Rendered:
        answered = Example((*messages, Message("assistant")), tuple(tools))
        return self.render(answered)[0].last_prompt

    def _prompt(self, instruction: str, input: str, system: str) -> str:
        """Return a prompt in which the special tokens of the values are marked."""
        question = f"{system}\n\n{instruction}" if system else instruction
        values = {"instruction": self.special.guard(question), "input": self.special.guard(input)}
        template = self.template_with_input if input else self.template
        # One pass, so that "{input}" in an instruction and all other braces stay unchanged
        return re.sub(r"\{(instruction|input)\}", lambda match: values[match[1]], template)

    def render(self, example: Example) -> list[Rendered]:
        if example.text:
            text = self.special.guard(example.text) + self.eos_token
            return [Rendered.of(text, [(0, len(text))])]
        if example.tools or any(message.tool_calls for message in example.messages):
            raise LitLoraError(f"--prompt_style {self.name} cannot write tool calls: use chat, or leave the row out")
        text, system = "", example.system
        supervised = []
        responses = [message for message in example.messages if message.role == "assistant"]
        for turn, response in zip(example.turns, responses, strict=True):
            text += self._prompt(turn.instruction, turn.input, system)
            start, system = len(text), ""
            text += self.special.guard(turn.output) + self.eos_token
            if response.is_supervised:
                supervised.append((start, len(text)))
        return [Rendered.of(text, supervised)]
