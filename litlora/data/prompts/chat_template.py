"""A checkpoint's own chat template, rendered in a sandbox as transformers renders it."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from textwrap import shorten
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, nodes
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from litlora.errors import LitLoraError
from litlora.utils.resource_limits import limited_resources

MAX_BITS = 10_000  # of an integer that a template computes
MAX_RENDERED = 10_000_000  # characters


class ChatTemplate:
    """A checkpoint's chat template, compiled once."""

    def __init__(
        self,
        source: str,
        tokens: Mapping[str, str | None],
        variables: Mapping[str, Any] | None = None,
        date: datetime | None = None,
    ) -> None:
        """Compile a template.

        `tokens` are the special tokens by the names that templates have for them, such as bos_token, and `variables`
        the user's. `date` is what the template writes as today's.
        """
        try:
            with limited_resources():  # the compiler evaluates constant expressions
                self._template = _environment(date or datetime.now()).from_string(source)
        except Exception as error:  # whatever the checkpoint's code may raise
            raise ChatTemplateError(f"has an error: {_shortened(error)}") from error
        known = {name: text for name, text in tokens.items() if text}
        self._values = {"tools": None, "documents": None, **known, **(variables or {})}

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, tools: Sequence[Any] | None = None
    ) -> str:
        """Return the text of a conversation."""
        text = ""
        values = {**self._values, "messages": messages, "add_generation_prompt": add_generation_prompt}
        if tools is not None:
            values["tools"] = tools
        try:
            with limited_resources():
                for piece in self._template.generate(values):
                    text += piece
                    if len(text) > MAX_RENDERED:
                        raise jinja2.TemplateRuntimeError(f"its text exceeds {MAX_RENDERED:,} characters")
        except Exception as error:  # whatever the checkpoint's code may raise
            raise ChatTemplateError(f"fails on a conversation: {_shortened(error)}") from error
        return text


class ChatTemplateError(LitLoraError):
    """What is wrong with the checkpoint's chat template, or with a conversation in it, in one sentence."""

    def __init__(self, reason: str) -> None:
        sentence = " ".join(f"--prompt_style chat: the checkpoint's chat template {reason}".split())
        super().__init__(f"{sentence}; use alpaca, none, or a text with {{instruction}}")
        self.reason = reason


def _shortened(error: Exception) -> str:
    return shorten(str(error), 200) or type(error).__name__


class _Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox with small integers, because the time limit cannot interrupt the arithmetic of huge ones."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise jinja2.exceptions.SecurityError("its numbers are too large")
        return super().call_binop(context, operator, left, right)


def _environment(date: datetime) -> ImmutableSandboxedEnvironment:
    """Return the functions that transformers gives a chat template, without access to the machine."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = date.strftime
    return environment


class _GenerationBlock(ext.Extension):
    """The block {% generation %}, which marks a response: renders its content unchanged."""

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
