"""A checkpoint's own chat template, rendered in a sandbox as transformers renders it."""

import json
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

    def __init__(self, source: str, bos_token: str | None, eos_token: str) -> None:
        try:
            with limited_resources():  # the compiler evaluates constant expressions
                self._template = _environment().from_string(source)
        except Exception as error:  # whatever the checkpoint's code may raise
            refuse_template(f"has an error: {_shortened(error)}", error)
        self._tokens = {"eos_token": eos_token} | ({"bos_token": bos_token} if bos_token else {})

    def render(self, messages: list[dict[str, object]], *, add_generation_prompt: bool) -> str:
        """Return the text of a conversation."""
        text = ""
        values = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with limited_resources():
                for piece in self._template.generate(values, **self._tokens):
                    text += piece
                    if len(text) > MAX_RENDERED:
                        raise jinja2.TemplateRuntimeError(f"its text exceeds {MAX_RENDERED:,} characters")
        except Exception as error:  # whatever the checkpoint's code may raise
            refuse_template(f"fails on a conversation: {_shortened(error)}", error)
        return text


def refuse_template(reason: str, cause: Exception | None = None) -> NoReturn:
    """Refuse the checkpoint's chat template in one sentence."""
    sentence = " ".join(f"--prompt_style chat: the checkpoint's chat template {reason}".split())
    raise LitLoraError(f"{sentence}; use alpaca, none, or a text with {{instruction}}") from cause


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


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the functions that transformers gives a chat template, without access to the machine."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
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


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
