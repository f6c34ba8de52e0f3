"""What a command line and its YAML file say, put in order before the parser reads them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from litlora.args import FinetuneLoraArgs
from litlora.errors import LitLoraError

CONFIG = "--config"
OPTIMIZER = "--optimizer"


def in_order(arguments: Sequence[str]) -> list[str]:
    """Put --config first, so that a flag beats the file wherever it stands, and join the --optimizer flags into one."""
    configs, rest = _take(list(_split_at_equals(arguments)), CONFIG)
    optimizer, rest = _take(rest, OPTIMIZER)
    contents = {path: _read(Path(path)) for _, path in configs}
    files = [part for flag, path in configs if contents[path] is not None for part in (flag, path)]
    return [*rest[:1], *files, *rest[1:], *_joined(optimizer, [contents[path] for _, path in configs])]


def _split_at_equals(arguments: Sequence[str]) -> Iterator[str]:
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if equals and (flag == CONFIG or flag.split(".")[0] == OPTIMIZER):
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
    except yaml.YAMLError:
        return text


def _read(path: Path) -> Any:
    """Read a YAML file, and refuse what YAML takes in silence: a key that is given twice, of which the last wins."""
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_repeated_keys(path, yaml.compose(text, Loader=yaml.SafeLoader))
        return _parse(text)
    except OSError as error:
        raise LitLoraError(f"--config {path} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        reason = ", ".join(filter(None, [error.context, error.problem]))
        raise LitLoraError(f"--config {path} line {line} is not valid YAML: {reason}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise LitLoraError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error


def _refuse_repeated_keys(path: Path, root: yaml.Node | None) -> None:
    nodes, visited = [root], set()
    while nodes:
        node = nodes.pop()
        if not isinstance(node, yaml.MappingNode) or id(node) in visited:  # an alias may lead back to where it stands
            continue
        visited.add(id(node))
        keys = set()
        for key, value in node.value:
            name = str(key.value)
            if name in keys:
                line = key.start_mark.line + 1
                raise LitLoraError(f"--config {path} line {line} gives {name} a second time: remove one of them")
            keys.add(name)
            nodes.append(value)
