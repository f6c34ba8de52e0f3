"""What a command line and its YAML file say, put in order before the parser reads them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from litlora.errors import LitLoraError

CONFIG = "--config"
OPTIMIZER = "--optimizer"


def in_order(arguments: Sequence[str]) -> list[str]:
    """Put --config first, so that a flag beats the file wherever it stands, and join the --optimizer flags into one."""
    arguments = list(_split_at_equals(arguments))
    configs, rest = _take(arguments, CONFIG)
    for _, path in configs:
        _refuse_repeated_keys(Path(path))
    optimizer, rest = _take(rest, OPTIMIZER)
    head = rest[:1]  # the command
    files = [part for flag in configs for part in flag]
    return [*head, *files, *rest[1:], *_joined(optimizer, [Path(path) for _, path in configs])]


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
        if part == flag or part.startswith(f"{flag}."):
            value = next(parts, None)
            if value is None:
                raise LitLoraError(f"{part} needs a value")
            taken.append((part, value))
        else:
            rest.append(part)
    return taken, rest


def _joined(optimizer: list[tuple[str, str]], configs: list[Path]) -> list[str]:
    """Return the --optimizer flags as a single one, on top of what the YAML files say."""
    if not optimizer:
        return []
    whole: Any = next((value for path in reversed(configs) if (value := _load(path).get("optimizer"))), "AdamW")
    for flag, text in optimizer:
        value = _parse(text)
        match flag.removeprefix(OPTIMIZER).split(".", 2)[1:]:
            case []:
                whole = value
            case ["class_path"]:
                whole = _as_dict(whole) | {"class_path": value}
            case ["init_args", name]:
                whole = _as_dict(whole)
                whole["init_args"] = (whole.get("init_args") or {}) | {name: value}
            case _:
                raise LitLoraError(f"{flag} is not a setting: there are class_path and init_args.NAME")
    return [OPTIMIZER, whole if isinstance(whole, str) else json.dumps(whole)]


def _as_dict(optimizer: Any) -> dict[str, Any]:
    return dict(optimizer) if isinstance(optimizer, dict) else {"class_path": optimizer}


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _load(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_bytes())
    return content if isinstance(content, dict) else {}


def _refuse_repeated_keys(path: Path) -> None:
    """YAML takes the last of two equal keys in silence."""
    try:
        root = yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)
    except OSError as error:
        raise LitLoraError(f"--config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise LitLoraError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if not isinstance(node, yaml.MappingNode):
            continue
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise LitLoraError(f"--config {path} line {line} gives {key.value} a second time: remove one of them")
            seen.add(key.value)
            nodes.append(value)
