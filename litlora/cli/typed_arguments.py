"""From given values to a command's arguments: jsonargparse checks and converts them, and adds the defaults.

It is imported only when a command runs, since it takes 0.1 s that --help and a misspelt flag need not wait for.
"""

import math
import re
from argparse import ArgumentError
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, get_origin

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import register_type

from litlora.args.common import GGUFPath, SecretStr, as_gguf
from litlora.cli.config_files import parse_value
from litlora.cli.settings import NEEDS, Given, Setting, cut, missing_from, refusal, settings_of
from litlora.errors import UsageError

KEY = re.compile(r'key "([^"]+)"')  # in a message of jsonargparse


def build(kind: Any, given: Mapping[str, Given]) -> Any:
    """Build a command's dataclass from values by dotted names."""
    parser = _parser(kind)
    values = parser.instantiate(_parse(parser, kind, given)).as_dict()
    return kind(**values | {name: value.value for name, value in given.items() if isinstance(value.value, dict)})


def as_yaml(kind: Any, given: Mapping[str, Given]) -> str:
    """Return all settings as a YAML file, what is required but missing as null."""
    parser, missing, settings = _parser(kind), missing_from(kind, given), settings_of(kind)
    placeholders = {name: Given(name, _placeholder(settings[name])) for name in missing}
    values = _parse(parser, kind, {**given, **placeholders})
    for name in missing:
        values[name] = None
    text: str = parser.dump(values, skip_unset=False, skip_validation=True)
    return text.rstrip("\n")


def _placeholder(setting: Setting) -> Any:
    """Return a value that a setting could have."""
    return {} if any(get_origin(each) is dict for each in setting.types) else "missing"


def _parser(kind: Any) -> ArgumentParser:
    register_type(SecretStr, serializer=repr, deserializer=_secret)
    register_type(GGUFPath, serializer=str, deserializer=_gguf_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False)
    return parser


def _secret(value: Any) -> SecretStr:
    if not isinstance(value, str):
        raise TypeError("a token is a text")
    return SecretStr(value)


def _gguf_path(value: Any) -> GGUFPath:
    if not isinstance(path := as_gguf(value), GGUFPath):
        raise TypeError(f"a GGUF file ends in {GGUFPath.SUFFIX}")
    return path


def _parse(parser: ArgumentParser, kind: Any, given: Mapping[str, Given]) -> Namespace:
    settings = settings_of(kind)
    try:
        raw = {name: _listed(settings[name], value.value) for name, value in given.items()}
        values: Namespace = parser.parse_object(raw)
    except ArgumentError as error:
        raise _as_sentence(error, settings, given) from None  # the message quotes the value, perhaps a token
    for name, value in given.items():
        values[name] = _settled(settings[name], value, values[name])
    return values


def _listed(setting: Setting, value: Any) -> Any:
    """Return a value as jsonargparse takes it: the items of a list, which a command line parts by commas."""
    return [item.strip() for item in value.split(",")] if setting.item and isinstance(value, str) else deepcopy(value)


def _as_sentence(error: ArgumentError, settings: Mapping[str, Setting], given: Mapping[str, Given]) -> UsageError:
    name = "".join(KEY.findall(str(error))[:1])
    if name not in given:
        return UsageError(" ".join(str(error).split()))
    return _mapping_refusal(settings[name], given[name]) or refusal(settings[name], given[name])


def _mapping_refusal(setting: Setting, given: Given) -> UsageError | None:
    """Return the error that names what is wrong within a mapping; None where it is no mapping at all."""
    if not any(get_origin(kind) is dict for kind in setting.types):
        return None
    value = parse_value(given.value) if isinstance(given.value, str) else given.value
    if isinstance(value, str) and value.lstrip().startswith("{") and "\\" in value:
        hint = "put the expression in single quotes, or double each backslash"
        return UsageError(f"{given.source} ({cut(value)}) is not valid YAML: {hint}")
    for key, number in value.items() if isinstance(value, dict) and setting.number else ():
        right = int if setting.number is int else int | float
        if number is not None and (not isinstance(number, right) or isinstance(number, bool)):  # {q_proj:4} is null
            return UsageError(f"{given.source}, {key} ({cut(str(number))}) must be {NEEDS[setting.number]}")
    return None


def _settled(setting: Setting, given: Given, value: Any) -> Any:
    """Return a value as its type has it: jsonargparse also accepts null for any type, and infinity."""
    if isinstance(given.value, dict):
        return deepcopy(given.value)  # YAML has read it; jsonargparse reads the texts in it again, in place
    if isinstance(given.value, str) and setting.types[0] is str:
        return given.value  # jsonargparse would read a list in "[a, b]"
    is_misread = value is None and given.value is not None  # "# x" is a comment to YAML, and "Null" is null
    if is_misread and (kinds := [kind for kind in setting.types if kind in (str, Path, SecretStr)]):
        return kinds[0](given.value)
    is_infinite = isinstance(value, float) and not math.isfinite(value)
    if is_misread or is_infinite or (value is None and not setting.is_nullable):
        raise refusal(setting, given)
    return _expand_home(value) if isinstance(value, Path) else value


def _expand_home(path: Path) -> Path:
    """Replace ~ where a shell has not, as in a YAML file or after an equals sign."""
    try:
        return path.expanduser()
    except RuntimeError:  # no such user
        return path
