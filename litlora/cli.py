"""What a command line and its YAML file say, put in order before the parser reads them."""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from litlora.args import FinetuneLoraArgs
from litlora.errors import LitLoraError
from litlora.utils.files import YAML_ERRORS

CONFIG = "--config"
OPTIMIZER = "--optimizer"
GROUPS = ("--train", "--eval")  # each takes a YAML file, or YAML itself, with the settings of that group
MOST_VALUES = 10_000  # of a YAML file; aliases can make a few lines stand for any number of them


def in_order(arguments: Sequence[str]) -> list[str]:
    """Put --config first, so that a flag beats the file wherever it stands, and join the --optimizer flags into one."""
    configs, rest = _take(list(_split_at_equals(arguments)), CONFIG)
    optimizer, rest = _take(rest, OPTIMIZER)
    contents = {path: _read(CONFIG, path) for _, path in configs}
    _check_groups(rest)
    files = [part for flag, path in configs if contents[path] is not None for part in (flag, path)]
    return [*rest[:1], *files, *rest[1:], *_joined(optimizer, [contents[path] for _, path in configs])]


def _check_groups(arguments: Sequence[str]) -> None:
    """Check the YAML that follows the flag of a group of settings."""
    for flag, value in pairwise(arguments):
        if flag in GROUPS and value.lstrip().startswith("{"):
            _check(f"{flag} {value}", value)
        elif flag in GROUPS:
            _read(flag, value)


def _split_at_equals(arguments: Sequence[str]) -> Iterator[str]:
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if equals and (flag in (CONFIG, *GROUPS) or flag.split(".")[0] == OPTIMIZER):
            yield from (flag, value)
        else:
            yield argument


def _take(arguments: list[str], flag: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Part the uses of a flag, or of the keys below it, and their values from the other arguments."""
    taken, rest, parts = [], [], iter(arguments)
    for part in parts:
        value = next(parts, None) if part == flag or part.startswith(f"{flag}.") else None
        if value is None:  # another flag, or one without its value, which the parser refuses
            rest.append(part)
        else:
            taken.append((part, value))
    return taken, rest


def _joined(optimizer: list[tuple[str, str]], contents: list[Any]) -> list[str]:
    """Return the --optimizer flags as a single one, on top of what the YAML files say."""
    if not optimizer:
        return []
    in_files = [content["optimizer"] for content in contents if isinstance(content, dict) and "optimizer" in content]
    whole: Any = in_files[-1] if in_files else FinetuneLoraArgs.optimizer
    for flag, text in optimizer:
        match flag.removeprefix(OPTIMIZER).split(".", 2)[1:]:
            case []:
                whole = value if isinstance(value := _parse(text), dict) else text
            case ["class_path"]:
                whole = _as_dict(whole) | {"class_path": text}
            case ["init_args", name]:
                whole = _as_dict(whole)
                whole["init_args"] = (whole.get("init_args") or {}) | {name: _parse(text)}
            case _:
                raise LitLoraError(f"{flag} is not a setting: there are class_path and init_args.NAME")
    # The parser fails at a mapping in the stead of another, hence a name in between.
    cleared = [OPTIMIZER, "none"] if in_files else []
    return [*cleared, OPTIMIZER, whole if isinstance(whole, str) else json.dumps(whole)]


def _as_dict(optimizer: Any) -> dict[str, Any]:
    return dict(optimizer) if isinstance(optimizer, dict) else {"class_path": optimizer}


def _parse(text: str) -> Any:
    """Read a value as the parser reads those of other flags: 1e-3 is a number, False is no text."""
    try:
        return get_loader("yaml")(text)
    except YAML_ERRORS:
        return text


def _read(flag: str, path: str) -> Any:
    """Read a YAML file that a flag names."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise LitLoraError(f"{flag} {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise LitLoraError(f"{flag} {path} is not valid YAML: {error}") from error
    return _check(f"{flag} {path}", text)


def _check(source: str, text: str) -> Any:
    """Parse YAML, and refuse what YAML takes in silence: a key that is given twice, or endless aliases."""
    try:
        _refuse_surprises(source, yaml.compose(text, Loader=yaml.SafeLoader))
        return get_loader("yaml")(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        reason = ", ".join(filter(None, [error.context, error.problem]))
        raise LitLoraError(f"{source} line {line} is not valid YAML: {reason}") from error
    except YAML_ERRORS as error:
        raise LitLoraError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error


def _refuse_surprises(source: str, root: yaml.Node | None) -> None:
    nodes, seen = [root], 0
    while nodes:
        node, seen = nodes.pop(), seen + 1
        if seen > MOST_VALUES:
            raise LitLoraError(f"{source} holds more than {MOST_VALUES:,} values, or an alias of itself: shorten it")
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated_keys(source, [key for key, _ in node.value])
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


def _refuse_repeated_keys(source: str, keys: Sequence[yaml.Node]) -> None:
    names = set()
    for key in keys:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise LitLoraError(f"{source} line {line} has a key that is not a name")
        if key.value in names:
            raise LitLoraError(f"{source} line {line} gives {key.value} a second time: remove one of them")
        names.add(key.value)
