"""Regular expressions of an adapter in a process of its own: a few characters can take years to compile or to match."""

import re
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

from litlora.lora.config import LoRAConfig
from litlora.utils.limited_process import serve


def _answer(request: Mapping[str, Any]) -> Any:
    if "expression" in request:
        return _compiles(request["expression"])
    layers = LoRAConfig(**request["settings"]).find_layers(request["names"])
    return {name: astuple(settings) for name, settings in layers.items()}


def _compiles(expression: str) -> bool:
    try:
        return re.compile(expression) is not None
    except (re.error, MemoryError, OverflowError, RecursionError):
        return False


if __name__ == "__main__":
    serve(_answer)
