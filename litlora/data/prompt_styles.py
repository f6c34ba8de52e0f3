"""Prompt styles: how an example becomes text, and which characters of it are supervised."""

import re
from dataclasses import dataclass
from typing import Protocol

from litlora.data.chat_template import ChatStyle, Rendered
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


class PromptStyle(Protocol):
    """The one way from an example to its text, which training, validation and generation share."""

    @property
    def name(self) -> str:
        """Return what names this style on the command line and beside an adapter."""

    @property
    def add_special_tokens(self) -> bool:
        """Say whether the tokenizer is to add bos: a chat template writes it itself."""

    def prompt(self, instruction: str, input: str = "", system: str = "") -> str:
        """Return the text that comes before the first response."""

    def render(self, example: Example) -> Rendered:
        """Return the text of all turns, every response followed by the token that ends it."""


def build_prompt_style(name: str, *, bos_token: str | None, eos_token: str, chat_template: str | None) -> PromptStyle:
    """Choose the style of this name, or take the name itself as a template."""
    if name == "chat":
        return ChatStyle(chat_template, bos_token, eos_token)
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
    """A text with places for instruction and input, repeated for each turn of a conversation."""

    name: str
    template: str
    template_with_input: str
    eos_token: str
    add_special_tokens: bool = True

    def prompt(self, instruction: str, input: str = "", system: str = "") -> str:
        values = {"instruction": f"{system}\n\n{instruction}" if system else instruction, "input": input}
        template = self.template_with_input if input else self.template
        # One pass, so that "{input}" in an instruction stays what it is, as do all other braces
        return re.sub(r"\{(instruction|input)\}", lambda place: values[place[1]], template)

    def render(self, example: Example) -> Rendered:
        text, system = "", example.system
        supervised = []
        for turn in example.turns:
            text += self.prompt(turn.instruction, turn.input, system)
            start, system = len(text), ""
            text += turn.output + self.eos_token
            supervised.append((start, len(text)))
        return Rendered(text, tuple(supervised))
