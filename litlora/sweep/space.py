"""The search space of a sweep: its dimensions, and the settings that a point of it stands for."""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from litlora.errors import LitLoraError

Value = str | float
"""A coordinate: the name of a choice, or a number of a range."""
Point = dict[str, Value]
SEED = 0
"""Of random draws, so that a repeated command draws the same points."""
RESERVED = {
    "seed": "list the seeds in seeds",
    "out_dir": "each trial has a folder of its own",
    "resume": "an interrupted trial always resumes",
    "overwrite": "choose another --out_dir",
    "dry_run": "a sweep compares trained adapters",
    "config": "put it into base",
}
"""Flags that no dimension can vary, and what to do in their place."""


@dataclass(frozen=True)
class Choices:
    """Settings by the name of each choice; a listed value of a flag is its own name."""

    name: str
    settings: Mapping[str, Mapping[str, Any]]

    @property
    def values(self) -> list[str]:
        return list(self.settings)

    def draw(self, generator: random.Random) -> Value:
        """Return one of the choices."""
        return generator.choice(self.values)

    def settings_of(self, value: Value, _: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the settings that a choice makes."""
        return self.settings[str(value)]


@dataclass(frozen=True)
class Range:
    """All numbers of an interval, even on a logarithmic scale if requested."""

    name: str
    low: float
    high: float
    log: bool

    @property
    def values(self) -> list[float]:
        return [self.low, self.high]

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def draw(self, generator: random.Random) -> Value:
        """Return a number of the interval."""
        if self.log:
            drawn = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            drawn = generator.uniform(self.low, self.high)
        return round(drawn) if self.is_whole else min(max(drawn, self.low), self.high)

    def settings_of(self, value: Value, _: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the flag with the number."""
        return {self.name: value}


@dataclass(frozen=True)
class Multiple:
    """A flag that is a multiple of another one, by the text of each factor."""

    name: str
    of: str
    factors: Mapping[str, float]

    @property
    def values(self) -> list[str]:
        return list(self.factors)

    def draw(self, generator: random.Random) -> Value:
        """Return one of the factors."""
        return generator.choice(self.values)

    def settings_of(self, value: Value, others: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the flag with the product; a whole number where it is one, as lora_alpha must be."""
        other = others.get(self.of)
        if not isinstance(other, int | float) or not _is_number(other):
            raise _fault(self.name, f"{self.of} ({text(other)}) must be a number in all combinations")
        number = self.factors[str(value)] * other
        return {self.name: int(number) if number == int(number) else number}


Dimension = Choices | Range | Multiple


@dataclass(frozen=True)
class Space:
    """The dimensions of a search, in the order of its file."""

    dimensions: tuple[Dimension, ...]

    @classmethod
    def of(cls, search: Mapping[str, Any]) -> "Space":
        """Read a search space; LitLoraError names a dimension that is none."""
        space = cls(tuple(_dimension(name, value) for name, value in search.items()))
        varied = {flag for choices in space._of(Choices, Range) for flag in _flags(choices)}
        for multiple in space._of(Multiple):
            if isinstance(multiple, Multiple) and multiple.of not in varied:
                hint = "list the values of both"
                raise _fault(multiple.name, f"times ({multiple.of}) must be another flag of the search: {hint}")
        return space

    def _of(self, *kinds: type) -> list[Dimension]:
        return [dimension for dimension in self.dimensions if isinstance(dimension, kinds)]

    def settings(self, point: Mapping[str, Value]) -> dict[str, Any]:
        """Return the flags that a point stands for: an optimizer before what sets a part of it, multiples last."""
        found: dict[str, Any] = {}
        for dimension in (*self._of(Choices, Range), *self._of(Multiple)):
            found |= dimension.settings_of(point[dimension.name], found)
        return dict(sorted(found.items(), key=lambda item: item[0] != "optimizer"))

    def shown(self, point: Mapping[str, Value]) -> dict[str, Value]:
        """Return a point with the products of its multiples."""
        settings = self.settings(point) if point else {}
        multiples = {multiple.name for multiple in self._of(Multiple)}
        return {name: settings[name] if name in multiples else value for name, value in point.items()}

    def values(self) -> Iterator[Point]:
        """Yield points in which each value of each dimension occurs, the others at their first."""
        first: Point = {dimension.name: dimension.values[0] for dimension in self.dimensions}
        yield first
        for dimension in self.dimensions:
            yield from (first | {dimension.name: value} for value in dimension.values[1:])

    def grid(self) -> list[Point]:
        """Return all combinations, the last dimension varying fastest."""
        for dimension in self._of(Range):
            raise _fault(dimension.name, "a grid needs a list of values, or give --method random or tpe")
        names = [dimension.name for dimension in self.dimensions]
        values: list[Sequence[Value]] = [dimension.values for dimension in self.dimensions]
        return [dict(zip(names, combination, strict=True)) for combination in product(*values)]

    def draws(self, count: int) -> list[Point]:
        """Return random points, the same at each call; without ranges, none twice."""
        generator = random.Random(SEED)
        if self._of(Range):
            return [{each.name: each.draw(generator) for each in self.dimensions} for _ in range(count)]
        points = self.grid()
        generator.shuffle(points)
        return points[:count]


def text(value: Any) -> str:
    """Return a value as it stands on a command line."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return ",".join(map(text, value))
        case dict():
            return json.dumps(value)
        case _:
            return str(value)


def words(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return settings as the words of a command line; those of a section may be a mapping."""
    found = []
    for name, value in settings.items():
        if isinstance(value, dict) and not prefix and name in ("train", "eval"):
            found += words(value, f"{name}.")
        else:
            found.append(f"--{prefix}{name}={text(value)}")
    return found


def _dimension(name: str, value: Any) -> Dimension:
    for flag in [name, *(_all_flags(value) if isinstance(value, dict) else ())]:
        if flag in RESERVED:
            raise _fault(flag, f"it cannot vary: {RESERVED[flag]}")
    match value:
        case [_, *_]:
            return _choices(name, {text(each): {name: each} for each in value}, len(value))
        case {"low": low, "high": high, **rest}:
            return _range(name, low, high, rest)
        case {"times": str(of), "values": [_, *_] as factors, **rest} if not rest:
            return _multiple(name, of, factors)
        case dict() if value and all(isinstance(each, dict) for each in value.values()):
            return Choices(name, {str(label): _dotted(each) for label, each in value.items()})
    form = (
        "a list of values, {low, high, log}, {times: FLAG, values: [...]}, or alternatives with settings of their own"
    )
    raise _fault(name, f"it must be {form}")


def _all_flags(value: Mapping[str, Any]) -> list[str]:
    return [flag for settings in value.values() if isinstance(settings, dict) for flag in settings]


def _dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings whose sections are written out."""
    pairs = (word.removeprefix("--").split("=", 1)[0] for word in words(settings))
    return {name: _lookup(settings, name) for name in pairs}


def _lookup(settings: Mapping[str, Any], name: str) -> Any:
    section, _, key = name.partition(".")
    return settings[name] if name in settings else settings[section][key]


def _choices(name: str, settings: Mapping[str, Mapping[str, Any]], count: int) -> Choices:
    if len(settings) < count:
        raise _fault(name, "a value is listed twice: remove one of them")
    return Choices(name, settings)


def _range(name: str, low: Any, high: Any, rest: Mapping[Any, Any]) -> Range:
    log = rest.get("log", False)
    if not _is_number(low) or not _is_number(high) or not low < high:
        raise _fault(name, f"low ({low}) and high ({high}) must be numbers, the lower one first")
    if rest.keys() - {"log"} or not isinstance(log, bool) or (log and low <= 0):
        raise _fault(name, "beside low and high there is only log: true, for numbers above 0")
    return Range(name, low, high, log)


def _multiple(name: str, of: str, factors: Sequence[Any]) -> Multiple:
    if not all(map(_is_number, factors)) or len(set(factors)) < len(factors):
        raise _fault(name, f"the values ({text(factors)}) must be different numbers")
    return Multiple(name, of, {text(factor): factor for factor in factors})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _flags(dimension: Dimension) -> set[str]:
    if isinstance(dimension, Choices):
        return {flag for settings in dimension.settings.values() for flag in settings}
    return {dimension.name}


def _fault(name: str, fault: str) -> LitLoraError:
    return LitLoraError(f"--search, {name}: {fault}", exit_code=2)
