"""The parser: words of a command line to the arguments of one command, or to the text that they ask for."""

import importlib
import re
import shlex
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

from litlora import __version__
from litlora.args import COMMANDS
from litlora.args.common import require
from litlora.cli.config_files import Schema, parse_value, read_config, read_text
from litlora.cli.help import command_help, is_list, overview, positional_of
from litlora.cli.litgpt_files import KEYS, translate
from litlora.cli.settings import Given, Setting, join, missing_from, refusal, sections_of, settings_of
from litlora.cli.suggestions import hint_for, nearest
from litlora.errors import LitLoraError, UsageError

FLAG = re.compile(r"--?[A-Za-z][\w.-]*(=.*)?", re.DOTALL)
CONFIG, OPTIMIZER = "--config", "--optimizer"
LITGPT = "finetune_lora"  # reads the files of Lit-GPT's command of this name
NULLS = ("null", "~")
HELP, PRINT_CONFIG, VERSION = ("-h", "--help"), "--print_config", "--version"


@dataclass(frozen=True)
class Call:
    """A command and its arguments."""

    command: str
    args: Any
    notes: tuple[str, ...] = ()
    """What a file asks for that is answered in another way."""


@dataclass(frozen=True)
class Words:
    """The words behind a command, sorted by what they are."""

    flags: list[tuple[str, str | None]] = field(default_factory=list)
    positional: list[str] = field(default_factory=list)
    switches: set[str] = field(default_factory=set)


def parse(arguments: Sequence[str]) -> Call | str:
    """Return what is to be called, or the help, version or settings that are to be printed in its place."""
    command, rest = _find_command(arguments)
    if command is None:
        return f"litlora {__version__}" if VERSION in arguments else overview()
    words = _sort(rest)
    if words.switches & set(HELP):
        return command_help(command)
    try:
        return _call(command, words)
    except UsageError as error:
        raise error if str(error).endswith("?") else UsageError(f"{error}; see litlora {command} --help") from error


def _call(command: str, words: Words) -> Call | str:
    kind = COMMANDS[command]
    prints = PRINT_CONFIG in words.switches
    notes: list[str] = []
    given = _given(command, words, settings_of(kind))
    if command == LITGPT:
        given, notes = translate(given, prepared=not prints)
    given = _with_base(given)
    missing = [f"--{name}" for name in missing_from(kind, given)]
    if missing and not prints:
        raise UsageError(f"missing {join(missing, 'and')}")
    typed_arguments = importlib.import_module("litlora.cli.typed_arguments")  # which imports jsonargparse
    if prints:
        return "\n".join([*(f"# {note}" for note in notes), str(typed_arguments.as_yaml(kind, given))])
    return Call(command, typed_arguments.build(kind, given), tuple(notes))


def _with_base(given: dict[str, Given]) -> dict[str, Given]:
    """Take the base that the adapter of --init_adapter names, unless one is given."""
    adapter = given.get("init_adapter")
    if adapter is None or not isinstance(adapter.value, str) or "checkpoint_dir" in given:
        return given
    adapter_folder = importlib.import_module("litlora.lora.adapter_folder")  # which imports numpy and tokenizers
    base = adapter_folder.find_named_base(Path(adapter.value), "--checkpoint_dir")
    return given | {"checkpoint_dir": Given(adapter.source, str(base))}


def _find_command(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Part the command from its words, among which a --config before it counts as well."""
    before: list[str] = []
    words = deque(arguments)
    while words and words[0].partition("=")[0] == CONFIG:
        before.append(words.popleft())
        if "=" not in before[-1] and words:
            before.append(words.popleft())
    if not words:
        raise UsageError(f"name a command: {join(list(COMMANDS), 'or')}; see litlora --help")
    command = words.popleft()
    if command in COMMANDS:
        return command, [*before, *words]
    if command in (*HELP, VERSION):
        return None, []
    near = nearest(command, COMMANDS)
    hint = f"did you mean {near}?" if near else f"there are {join(list(COMMANDS), 'and')}"
    what = "the command comes before its flags" if FLAG.fullmatch(command) else "there is no such command"
    raise UsageError(f"{what}: {hint}")


def _sort(words: Sequence[str]) -> Words:
    """Sort words into flags with their values, positional ones and switches, which have no value."""
    found, queue = Words(), deque(words)
    while queue:
        word = queue.popleft()
        flag, equals, value = word.partition("=")
        if word in (*HELP, PRINT_CONFIG):
            found.switches.add(word)
        elif not FLAG.fullmatch(word):
            found.positional.append(word)
        elif equals:
            found.flags.append((flag, value))
        else:
            found.flags.append((flag, queue.popleft() if queue and not FLAG.fullmatch(queue[0]) else None))
    return found


def _given(command: str, words: Words, settings: Mapping[str, Setting]) -> dict[str, Given]:
    """Return all settings that are given: files first, so that a flag beats them wherever it stands."""
    sections = sections_of(COMMANDS[command])
    _refuse_unknown(words, [*settings, *sections])
    flags = _with_positional(command, words)
    schema = Schema(settings, sections, KEYS if command == LITGPT else ())
    given: dict[str, Given] = {}
    for flag, path in _take(flags, [CONFIG]):
        given |= read_config(f"{flag} {path}", path, schema)
    for flag, text in _take(flags, [f"--{section}" for section in sections]):
        read = read_text if text.lstrip().startswith("{") else read_config
        given |= read(f"{flag} {text}", text, schema, flag.removeprefix("--"))
    given |= _given_by_flags(flags, settings) | _given_by_words(command, words)
    return _with_optimizer(given, settings, [pair for pair in flags if pair[0].split(".")[0] == OPTIMIZER])


def _refuse_unknown(words: Words, known: Collection[str]) -> None:
    """Name all unknown flags in one line, but none of their values: one of them may be a token."""
    faults = []
    for flag, _ in words.flags:
        name = flag.removeprefix("--")
        is_optimizer = flag.startswith(f"{OPTIMIZER}.") and "optimizer" in known
        if name not in known and flag != CONFIG and not is_optimizer:
            hint = hint_for(flag, known)
            faults.append(f"unrecognized {flag}{hint and f': {hint}'}")
    if faults:
        raise UsageError("; ".join(faults))


def _with_positional(command: str, words: Words) -> list[tuple[str, str | None]]:
    """Return the flags and the positional argument as one of them: CHECKPOINT is short for --checkpoint_dir."""
    if not words.positional:
        return words.flags
    count = len(words.positional)
    stray = f"{count} words stand without a flag"
    if (positional := positional_of(command)) is None and count == 1:
        raise UsageError(_stray_word(command, words.positional[0]))
    if positional is None:
        raise UsageError(f"{command} has flags only, but {stray}")
    flag, metavar = positional
    if is_list(command, flag.removeprefix("--")):
        return words.flags
    if count > 1:
        raise UsageError(f"{command} takes one {metavar}, but {stray}")
    value = words.positional[0]
    if others := {given for name, given in words.flags if name == flag} - {value}:
        raise UsageError(f"{metavar} ({value}) and {flag} ({others.pop()}) are the same setting: give one of them")
    return [*words.flags, (flag, value)]


def _given_by_words(command: str, words: Words) -> dict[str, Given]:
    """Return the setting that takes all words without a flag, if the command has one and they are given."""
    flag, metavar = positional_of(command) or ("", "")
    name = flag.removeprefix("--")
    if not words.positional or not is_list(command, name):
        return {}
    if any(given == flag for given, _ in words.flags):
        raise UsageError(f"{metavar} ({words.positional[0]}) and {flag} are the same setting: give one of them")
    return {name: Given(flag, list(words.positional))}


def _stray_word(command: str, word: str) -> str:
    """Return the sentence on a word without a flag, with the setting that was probably meant."""
    hint = f": did you mean --source {shlex.quote(word)}?" if "source" in settings_of(COMMANDS[command]) else ""
    return f"{command} has flags only, but 1 word stands without a flag{hint}"


def _take(flags: Sequence[tuple[str, str | None]], names: Collection[str]) -> Iterator[tuple[str, str]]:
    for flag, value in flags:
        if flag in names and value is None:
            raise UsageError(f"{flag} needs a value")
        if flag in names and value is not None:
            yield flag, value


def _given_by_flags(flags: Sequence[tuple[str, str | None]], settings: Mapping[str, Setting]) -> dict[str, Given]:
    given: dict[str, Given] = {}
    for flag, text in flags:
        name = flag.removeprefix("--")
        if name not in settings or flag == OPTIMIZER:
            continue
        if text is None and bool not in settings[name].types:
            raise UsageError(f"{flag} needs a value")
        is_null = text in NULLS and settings[name].is_nullable and not settings[name].is_text
        value = None if is_null else "true" if text is None else text
        several = name in given and any(get_origin(kind) is list for kind in settings[name].types)
        given[name] = Given(flag, [*_as_list(given[name].value), value] if several else value)
    return given


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _with_optimizer(
    given: dict[str, Given], settings: Mapping[str, Setting], flags: Sequence[tuple[str, str | None]]
) -> dict[str, Given]:
    """Return what is given with the --optimizer flags applied on top of what the files say."""
    for flag, text in flags:
        if text is None:
            raise UsageError(f"{flag} needs a value")
        before = given.get("optimizer", Given(OPTIMIZER, settings["optimizer"].default))
        if flag != OPTIMIZER and not isinstance(before.value, str | dict):
            raise refusal(settings["optimizer"], before)
        given = given | {"optimizer": Given(before.source, _changed_optimizer(before.value, flag, text))}
    return given


def _changed_optimizer(optimizer: Any, flag: str, text: str) -> Any:
    parts = optimizer if isinstance(optimizer, dict) else {"class_path": optimizer}
    match flag.removeprefix(OPTIMIZER).split(".", 2)[1:]:
        case []:
            return value if isinstance(value := parse_value(text), dict) else text
        case ["class_path"]:
            return parts | {"class_path": text}
        case ["init_args", name]:
            init_args: dict[str, Any] = parts.get("init_args") or {}
            require(isinstance(init_args, dict), "--optimizer.init_args", init_args, "a mapping")
            return parts | {"init_args": init_args | {name: parse_value(text)}}
        case _:
            raise LitLoraError(f"{flag} is not a setting: there are class_path and init_args.NAME")
