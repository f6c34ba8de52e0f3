"""What `generate` and `chat` need before weights are read, without torch: the model, and prompts as tokens."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from litlora.args.inference import NO_PROMPT, ChatArgs, GenerateArgs
from litlora.data.dataset import Invalid, read_rows, require_rows
from litlora.data.examples import Example, Message
from litlora.data.prompts.rendered import Rendered
from litlora.data.prompts.styles import PromptStyle
from litlora.data.readers.parsers import parse_rows
from litlora.data.readers.raw_files import RawFile
from litlora.data.readers.row_formats import PROMPT
from litlora.errors import LitLoraError
from litlora.generation.model_files import ModelFiles
from litlora.utils.console import is_terminal, read_input
from litlora.utils.files import check_absent

COMPLETION = "completion"
"""The key of a completion in --out_file."""


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    files: ModelFiles
    style: PromptStyle
    ids: list[int]

    @classmethod
    def read(cls, args: GenerateArgs) -> Self:
        """Tokenize the prompt for the base, or refuse what does not fit it."""
        files = ModelFiles.find(args)
        style = files.style()
        (ids,) = files.encode(style, [style.prompt(read_text(args.prompt), args.input, args.system)])
        files.check(ids, args.max_new_tokens)
        return cls(files, style, ids)


@dataclass(frozen=True)
class PromptFile:
    """The rows of --prompts."""

    files: ModelFiles
    style: PromptStyle
    rows: list[dict[str, Any]]
    ids: list[list[int]]

    @classmethod
    def read(cls, args: GenerateArgs) -> Self:
        """Read and tokenize the rows, or refuse one that does not fit."""
        assert args.prompts is not None
        assert args.out_file is not None
        check_absent(args.out_file, "--out_file")
        files = ModelFiles.find(args)
        rows, examples = read_prompts(args.prompts)
        is_chat = files.tokenizer.chat_template is not None and any(example.is_chat for _, example in examples)
        style = files.style("chat" if is_chat else "none")
        rendered = [render(style, location, example, args.system) for location, example in examples]
        ids = files.encode(style, rendered)
        for (location, _), each in zip(examples, ids, strict=True):
            with naming(location):
                files.check(each, args.max_new_tokens)
        return cls(files, style, rows, ids)

    def answered(self, completions: list[str]) -> bytes:
        """Return the rows with their completions, as JSONL."""
        rows = ({**row, COMPLETION: text} for row, text in zip(self.rows, completions, strict=True))
        return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode()


def find_for_chat(args: ChatArgs) -> ModelFiles:
    """Find a model whose prompt style has conversations, for a person at a terminal."""
    if not is_terminal():
        raise LitLoraError("chat needs a terminal: for a prompt, or a file of them, use litlora generate")
    if find_spec("prompt_toolkit") is None:
        raise LitLoraError("chat needs prompt_toolkit: install it with: pip install 'litlora[chat]'")
    files = ModelFiles.find(args)
    files.style("chat")  # only a check
    return files


def read_prompts(path: Path) -> tuple[list[dict[str, Any]], list[tuple[str, Example]]]:
    """Return the rows of a file, and their examples with their locations; LitLoraError if any is invalid."""
    raw = RawFile.from_path(path, f"there is no file {path} for --prompts")
    located = list(parse_rows(raw))
    (parsed, refused), invalid = read_rows(located, PROMPT), Invalid()
    for location, error in refused:
        invalid.add(location, error)
    require_rows(str(path), len(parsed), invalid, PROMPT)
    rows: list[dict[str, Any]] = [row for _, row in located if isinstance(row, dict)]
    for row, (location, _) in zip(rows, parsed, strict=True):
        if COMPLETION in row:
            raise LitLoraError(f'{location}: the row has a "{COMPLETION}", which would be lost: rename it')
    return rows, [(location, row.example) for location, row in parsed]


def render(style: PromptStyle, location: str, example: Example, system: str) -> Rendered:
    """Return the text of a row up to its last answer, after a system message if it has none of its own."""
    messages = example.messages[:-1]
    opening = [Message("system", system)] if system and not example.system else []
    with naming(location):
        return style.conversation([*opening, *messages], example.tools)


@contextmanager
def naming(location: str) -> Iterator[None]:
    """Put the location of a row before an error."""
    try:
        yield
    except LitLoraError as error:
        raise LitLoraError(f"{location}: {error}") from error


def read_text(given: str | None) -> str:
    """Return --prompt, or else standard input without its last line break."""
    text = read_input().removesuffix("\n") if given is None else given
    if not text:
        raise LitLoraError(NO_PROMPT)
    return text
