"""A command's settings: its dataclass as dotted names, and values converted to their types."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from litlora.args import SecretStr
from litlora.cli.suggestions import near_value
from litlora.errors import UsageError

SHOWN = 60  # characters of a value that an error quotes
NEEDS = {
    NoneType: "null", bool: "true or false", int: "a whole number", float: "a number", Path: "a path", str: "a text",
    SecretStr: "a text", dict: "a mapping",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One setting of a command, by its dotted name."""

    name: str
    type: Any
    default: Any

    @property
    def is_required(self) -> bool:
        return self.default is MISSING


@dataclass(frozen=True)
class Given:
    """A value as the user wrote it."""

    source: str
    """Flag, or file, line and key."""
    text: str | None
    """The scalar as it was written; None for null in YAML, a list or a mapping."""
    value: Any
    """What YAML reads in it."""

    @property
    def is_null(self) -> bool:
        return self.value is None and self.text in (None, "null", "~")


def settings_of(kind: Any) -> dict[str, Setting]:
    """Return all settings of a command's dataclass, those of its sections by dotted names."""
    return {setting.name: setting for setting in _settings(kind, "")}


def _settings(kind: Any, prefix: str) -> Iterator[Setting]:
    for field in fields(kind):
        if is_dataclass(field.type):
            yield from _settings(field.type, f"{prefix}{field.name}.")
        else:
            yield Setting(prefix + field.name, field.type, field.default)


def sections_of(kind: Any) -> list[str]:
    """Return the names of the settings that hold settings of their own."""
    return [field.name for field in fields(kind) if is_dataclass(field.type)]


def build(kind: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Build a command's dataclass from values by dotted names."""
    sections = sections_of(kind)
    own = {field.name: values[prefix + field.name] for field in fields(kind) if prefix + field.name in values}
    nested = {f.name: build(f.type, values, f"{prefix}{f.name}.") for f in fields(kind) if f.name in sections}
    return kind(**own, **nested)


def members(kind: Any) -> tuple[Any, ...]:
    """Return the types that a union allows, null first since its text is also a string; any other type alone."""
    if not isinstance(kind, UnionType) and get_origin(kind) is not Union:
        return (kind,)
    return tuple(sorted(get_args(kind), key=lambda member: member is not NoneType))


def choices(kind: Any) -> list[str]:
    """Return the words that a setting can be, in the order in which they are declared."""
    return [word for member in members(kind) if get_origin(member) is Literal for word in get_args(member)]


def convert(setting: Setting, given: Given) -> Any:
    """Return the value as the setting's type, or refuse it."""
    for member in members(setting.type):
        if _fits(member, given):
            return _cast(member, given)
    raise UsageError(_misfit(setting, given))


def _fits(kind: Any, given: Given) -> bool:
    value, is_bool = given.value, isinstance(given.value, bool)
    if get_origin(kind) is Literal:
        return given.text in get_args(kind)
    if kind is NoneType:
        return given.is_null
    if kind in (str, Path, SecretStr):
        return given.text is not None
    if kind is int:
        return isinstance(value, int) and not is_bool
    if kind is float:
        return isinstance(value, int | float) and not is_bool and math.isfinite(value)
    return isinstance(value, get_origin(kind) or kind)


def _cast(kind: Any, given: Given) -> Any:
    if get_origin(kind) is Literal:
        return given.text
    if kind in (str, Path, SecretStr):
        return kind(given.text)
    return float(given.value) if kind is float else given.value


def _misfit(setting: Setting, given: Given) -> str:
    if SecretStr in members(setting.type):  # its value is never quoted
        return f"{given.source} must be a text"
    shown = str(given.value) if given.text is None else given.text
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
    fault = f"{given.source} ({'null' if given.is_null else shown}) must be {need(setting.type)}"
    near = near_value(setting.name, given.text or "", [*choices(setting.type), *_null(setting.type)])
    return f"{fault}: did you mean {near}?" if near else fault


def _null(kind: Any) -> list[str]:
    return ["null"] if NoneType in members(kind) else []


def need(kind: Any) -> str:
    """Say in words what a value of this type must be."""
    others = [member for member in members(kind) if get_origin(member) is not Literal]
    words = [*choices(kind), *(NEEDS[get_origin(member) or member] for member in sorted(others, key=_null_last))]
    return join(words, "or")


def _null_last(kind: Any) -> bool:
    return kind is NoneType


def join(words: list[str], conjunction: str) -> str:
    """Join words as a sentence does: a, b or c."""
    return f" {conjunction} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
