"""A checkpoint's own chat template, rendered in a sandbox as transformers renders it."""

import json
from dataclasses import dataclass
from datetime import datetime
from textwrap import shorten
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, nodes
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from litlora.data.examples import Example
from litlora.errors import LitLoraError
from litlora.utils.resource_limits import limited_resources

MAX_BITS = 10_000  # of a number in a chat template
MAX_RENDERED = 10_000_000  # characters; a chat template that writes more would never end


@dataclass(frozen=True)
class Rendered:
    """The text of an example, and the characters [start, end) that are learned: each response with its end."""

    text: str
    supervised: tuple[tuple[int, int], ...]


class ChatStyle:
    """The checkpoint's own chat template, rendered as transformers renders it."""

    name = "chat"
    add_special_tokens = False

    def __init__(self, chat_template: str | None, bos_token: str | None, eos_token: str) -> None:
        if chat_template is None:
            raise LitLoraError(
                "--prompt_style chat needs a checkpoint with a chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json), and this one has none; use alpaca, none, or a text with {instruction}"
            )
        try:
            with limited_resources():  # constants are folded here
                self._template = _environment().from_string(chat_template)
        except Exception as error:  # whatever the checkpoint's code may raise
            _refuse(f"has an error: {_said(error)}", error)
        self._eos_token = eos_token
        self._tokens = {"eos_token": eos_token} | ({"bos_token": bos_token} if bos_token else {})

    def prompt(self, instruction: str, input: str = "", system: str = "") -> str:
        return self._write([*_opening(system), _question(instruction, input)], add_generation_prompt=True)

    def render(self, example: Example) -> Rendered:
        text, end = "", 0
        supervised = []
        messages = _opening(example.system)
        for turn in example.turns:
            messages.append(_question(turn.instruction, turn.input))
            prompt = self._write(messages, add_generation_prompt=True)
            if not prompt.startswith(text[:end]):
                _refuse("writes an answer differently once the conversation goes on, so it cannot be used for training")
            messages.append({"role": "assistant", "content": turn.output})
            text = self._write(messages, add_generation_prompt=False)
            if not text.startswith(prompt):
                _refuse("writes a prompt differently once it is answered, so it cannot be used for training")
            end = self._end_of_answer(text, len(prompt), turn.output.strip())
            supervised.append((len(prompt), end))
        return Rendered(text, tuple(supervised))

    def _end_of_answer(self, text: str, start: int, answer: str) -> int:
        """Find the end of what follows an answer: the eos token, or the template's own mark where it has another."""
        position = text.find(answer, start)
        if position < 0:
            _refuse("leaves out a part of the answer, so it cannot be used for training")
        answered = position + len(answer)
        eos = text.find(self._eos_token, answered)
        end = len(text.rstrip()) if eos < 0 else eos + len(self._eos_token)
        if end <= answered:
            _refuse("writes nothing after an answer, so a model could not learn from it where to stop")
        return end

    def _write(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        text = ""
        values = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with limited_resources():
                for part in self._template.generate(values, **self._tokens):
                    text += part
                    if len(text) > MAX_RENDERED:
                        raise jinja2.TemplateRuntimeError("its text does not end")
        except Exception as error:  # whatever the checkpoint's code may raise
            _refuse(f"fails on a conversation: {_said(error)}", error)
        return text


def _opening(system: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _question(instruction: str, input: str) -> dict[str, str]:
    return {"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}


def _said(error: Exception) -> str:
    return shorten(str(error), 200) or type(error).__name__


def _refuse(reason: str, cause: Exception | None = None) -> NoReturn:
    sentence = " ".join(f"--prompt_style chat: the checkpoint's chat template {reason}".split())
    raise LitLoraError(f"{sentence}; use alpaca, none, or a text with {{instruction}}") from cause


class _Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox whose numbers stay small, since no limit of time interrupts their arithmetic."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise jinja2.exceptions.SecurityError("its numbers are too large")
        return super().call_binop(context, operator, left, right)


def _environment() -> ImmutableSandboxedEnvironment:
    """Give a chat template what transformers gives it, and nothing of this machine."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(ext.Extension):
    """The block {% generation %}, with which templates mark an answer: its content, unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without the HTML escapes of jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
