"""Values with a notation of their own: sizes, blocks, names of layers, and regular expressions for these."""

import re
from collections.abc import Mapping

from litlora.args.common import require
from litlora.errors import LitLoraError

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)")
UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
LAYER_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
BLOCKS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
"""A block, or the first and last of some."""


def is_expression(text: object) -> bool:
    """Tell whether a value is a regular expression, also as a part of another."""
    try:
        return isinstance(text, str) and bool(re.compile(f"({text})$"))
    except (re.error, OverflowError, RecursionError):
        return False


def require_numbers_by_expression(flag: str, pattern: Mapping[str, float] | None) -> None:
    """Refuse a pattern unless its keys are regular expressions and its values at least 1."""
    for key, number in (pattern or {}).items():
        require(is_expression(key), flag, key, "a mapping whose keys are layer names or regular expressions")
        require(number >= 1, f"{flag}, {key}", number, "at least 1")


def as_bytes(flag: str, size: str) -> int:
    """Return the number of bytes that a text such as 8GB, 7.5 GiB or 900MB gives."""
    found = SIZE.fullmatch(size.strip())
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    factor = units.get(found[2].lower()) if found else None
    need = f"a number with a unit, such as 8GB or 7.5GiB; the units are {', '.join(UNITS)}"
    if found is None or factor is None:
        raise LitLoraError(f"{flag} ({size}) must be {need}")
    return round(float(found[1]) * factor)


def as_targets(targets: list[str] | str) -> list[str] | str:
    """Return layer names as a list, whose commas part them in a text; another text is a regular expression."""
    names = [name.strip() for name in (targets.split(",") if isinstance(targets, str) else targets)]
    if "all_linear" in names:
        raise LitLoraError("--lora_targets (all_linear) names no layer: did you mean all-linear?")
    if names and all(map(LAYER_NAME.fullmatch, names)):
        return names
    is_text = isinstance(targets, str) and is_expression(targets)
    require(is_text, "--lora_targets", targets, "layer names, such as q_proj,down_proj, or a regular expression")
    return targets


def as_blocks(blocks: list[int] | int | str) -> list[int]:
    """Return the numbers of blocks that a text such as 0,2,8-15 gives."""
    texts = blocks.split(",") if isinstance(blocks, str) else blocks if isinstance(blocks, list) else [blocks]
    ranges = [BLOCKS.fullmatch(str(text).strip()) for text in texts]
    numbers = [range(int(found[1]), int(found[2] or found[1]) + 1) for found in ranges if found]
    is_right = bool(ranges) and len(numbers) == len(ranges) and all(numbers)
    require(is_right, "--lora_layers", blocks, "blocks, such as 8-15 or 0,2,5")
    return sorted({number for some in numbers for number in some})
