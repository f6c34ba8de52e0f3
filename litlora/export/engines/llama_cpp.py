"""Scores by llama.cpp, through the xllamacpp package, which is an extra.

llama.cpp prints, and ends its process where it does not like a file: it has a process of its own.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from litlora.errors import LitLoraError
from litlora.export.scoring import Scores

WORKER = "llama_cpp_worker.py"
TIMEOUT = 1800  # seconds
ERROR = re.compile(r"^[\d.]+ E (?:\w+ +)?\w+ *: +(.*)$", re.MULTILINE)
"""An error in llama.cpp's log: those after the first one follow from it."""


@dataclass
class LlamaCppEngine:
    """A GGUF file of a model, with one of an adapter if there is one."""

    model: Path
    adapter: Path | None
    texts: tuple[str, ...] = ()
    """What is tokenized beside."""
    tokens: list[list[int]] = field(default_factory=list)
    """Of the texts, once something has been scored."""
    stops: tuple[int, ...] = ()
    """Tokens at which a generation should end."""
    ends: list[int] = field(default_factory=list)
    """Those of them at which llama.cpp ends one, once something has been scored."""

    def __post_init__(self) -> None:
        if find_spec("xllamacpp") is None:
            raise LitLoraError("--engine llama.cpp needs the xllamacpp package: pip install 'litlora[llama-cpp]'")

    def __call__(self, sequences: Sequence[list[int]], starts: Sequence[int]) -> list[Scores]:
        scored = list(zip(sequences, starts, strict=True))
        answer = self._ask({"sequences": scored, "texts": self.texts, "stops": self.stops})
        self.tokens, self.ends = answer["tokens"], answer["ends"]
        scores: list[Scores] = answer["log_probs"]
        return scores

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have a process answer a request (see `llama_cpp_worker.py`)."""
        adapter = str(self.adapter) if self.adapter else None
        setup = {"model": str(self.model), "adapter": adapter, "threads": torch.get_num_threads()}
        worker = [sys.executable, str(Path(__file__).with_name(WORKER))]
        child = subprocess.run(
            worker, input=json.dumps(setup | request), capture_output=True, text=True, errors="replace", timeout=TIMEOUT
        )
        if child.returncode:
            hint = "name the GGUF file of its base with --base_dir" if self.adapter else "export it again"
            fault = _first_error(child.stdout + child.stderr) or f"it ended with {child.returncode}"
            raise LitLoraError(f"llama.cpp does not load {self.adapter or self.model} ({fault}): {hint}")
        answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        return answer


def _first_error(log: str) -> str:
    """Return what llama.cpp gives as its reason, or the last line of an exception."""
    found = ERROR.search(log)
    return found[1] if found else next(reversed(log.strip().splitlines()), "")
