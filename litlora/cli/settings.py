"""A command's settings: its dataclass as dotted names, and what is wrong with a value in one sentence."""

from collections.abc import Collection, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from litlora.args.common import GGUFPath, SecretStr
from litlora.cli.suggestions import near_value
from litlora.errors import UsageError

SHOWN = 60  # characters of a value that an error quotes
NEEDS = {
    NoneType: "null", bool: "true or false", int: "a whole number", float: "a number", Path: "a path", str: "a text",
    SecretStr: "a text", GGUFPath: "the path of a .gguf file", dict: "a mapping", list: "a list",
}  # fmt: skip
FORM = "such as {q_proj: 4}"  # of a mapping to numbers


@dataclass(frozen=True)
class Setting:
    """One setting of a command, by its dotted name."""

    name: str
    type: Any
    default: Any

    @property
    def is_required(self) -> bool:
        return self.default is MISSING

    @property
    def types(self) -> tuple[Any, ...]:
        """The types that a union allows; any other type alone."""
        is_union = isinstance(self.type, UnionType) or get_origin(self.type) is Union
        return get_args(self.type) if is_union else (self.type,)

    @property
    def is_nullable(self) -> bool:
        return NoneType in self.types

    @property
    def is_text(self) -> bool:
        """Whether a flag takes any text as it stands, "null" among them."""
        return set(self.types) <= {str, NoneType}

    @property
    def item(self) -> Any:
        """The type of the items of a list, whose commas part them on the command line; None for another type."""
        return next((get_args(kind)[0] for kind in self.types if get_origin(kind) is tuple), None)

    @property
    def item_choices(self) -> list[str]:
        """The words that each item of a list can be."""
        return [*get_args(self.item)] if get_origin(self.item) is Literal else []

    @property
    def number(self) -> Any:
        """The type of the numbers in a mapping; None for another type."""
        kinds = [get_args(kind)[1] for kind in self.types if get_origin(kind) is dict]
        return next((kind for kind in kinds if kind in (int, float)), None)

    @property
    def choices(self) -> list[str]:
        """The words that it can be, in the order in which they are declared."""
        return [word for kind in self.types if get_origin(kind) is Literal for word in get_args(kind)]

    @property
    def need(self) -> str:
        """What a value must be, in words."""
        others = [NEEDS[get_origin(kind) or kind] for kind in self.types if get_origin(kind) not in (Literal, tuple)]
        others = [f"{need} {FORM}" if need == NEEDS[dict] and self.number else need for need in others]
        each = join(self.item_choices, "or") if self.item_choices else NEEDS.get(self.item)
        others += [f"a list, each item {each}"] if self.item else []
        return join([*self.choices, *sorted(others, key=lambda need: need == "null")], "or")


@dataclass(frozen=True)
class Given:
    """A value as the user wrote it."""

    source: str
    """Flag, or file, line and key."""
    value: Any
    """A text, not converted yet; in a YAML file also null, a list or a mapping."""


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


def missing_from(kind: Any, names: Collection[str]) -> list[str]:
    """Return the names of the required settings that are not among these."""
    return [name for name, setting in settings_of(kind).items() if setting.is_required and name not in names]


def refusal(setting: Setting, given: Given) -> UsageError:
    """Return the error that states what a value must be, with the choice that was probably meant."""
    if SecretStr in setting.types:  # its value is never quoted
        return UsageError(f"{given.source} must be a text")
    shown = cut("null" if given.value is None else str(given.value))
    null = ["null"] if setting.is_nullable else []
    fault = f"{given.source} ({shown}) must be {setting.need}"
    words = [*setting.choices, *setting.item_choices, *null]
    near = near_value(setting.name, shown, words) if isinstance(given.value, str) else None
    return UsageError(f"{fault}: did you mean {near}?" if near else fault)


def cut(text: str) -> str:
    """Return a value as an error quotes it."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def join(words: list[str], conjunction: str) -> str:
    """Join words as a sentence does: a, b or c."""
    return f" {conjunction} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
