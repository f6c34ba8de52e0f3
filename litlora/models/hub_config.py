"""Values of a config.json, each refused by its key in one sentence where it is not what litlora supports."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from litlora.errors import LitLoraError

# Larger models do not exist, and arithmetic on their shapes could overflow.
MAX_SIZE = 2**20
LENGTHS = ("vocab_size", "max_position_embeddings", "original_max_position_embeddings", "sliding_window")
MAX_LENGTH = 2**31
SHOWN = 60  # characters of a value in a refusal


def refusal(key: str, value: object, reason: str) -> LitLoraError:
    """Return the error that refuses a value of config.json."""
    return LitLoraError(f'config.json has "{key}": {shown(value)}, which litlora does not support: {reason}')


def shown(value: object) -> str:
    """Return a value as JSON, cut off where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def required(values: Mapping[str, Any], key: str) -> object:
    """Return a value that the model cannot be built without."""
    if values.get(key) is None:
        raise LitLoraError(f'config.json has no "{key}", without which the model cannot be built')
    return values[key]


def size(values: Mapping[str, Any], key: str) -> int:
    """Read an integer above 0."""
    value = required(values, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refusal(key, value, "it must be a whole number above 0")
    if value > (limit := MAX_LENGTH if key in LENGTHS else MAX_SIZE):
        raise refusal(key, value, f"it must be at most {limit}")
    return value


def number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Read a finite number above 0."""
    value = required({key: default} | dict(values), key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise refusal(key, value, "it must be a number above 0")
    return float(value)


def boolean(values: Mapping[str, Any], key: str) -> bool:
    """Read true or false; an absent key is false."""
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise refusal(key, value, "it must be true or false")
    return value
