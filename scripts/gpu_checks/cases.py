"""The cases of the check, in the order of their worth: whoever cuts it off has the first ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.jobs import Device

from litlora.models.config import GPTConfig

TINY = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "model_type": "llama",
}  # fmt: skip
TINY_SHAPE = "tiny"


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    task: Literal["tests", "train", "generate"]
    shape: str = ""
    """A shape of memory_table.py, or TINY_SHAPE."""
    quantized: bool = False
    program: Literal["litlora", "PEFT"] = "litlora"

    @property
    def name(self) -> str:
        if self.task == "tests":
            return "tests"
        base = "NF4" if self.quantized else "bfloat16"
        return f"{self.task} {self.shape}, {base}, {self.program}"


@dataclass(frozen=True)
class Work:
    """What a case runs on."""

    folder: str
    shape: str
    quantized: bool
    device: Device
    steps: int
    rows: int
    """The number of rows in a global batch."""
    most_tokens: int
    """The most tokens of a micro-batch that are tried where a program does not choose them."""
    new_tokens: int
    seconds: float
    """How long the case may take."""

    @property
    def checkpoint(self) -> Path:
        return Path(self.folder) / "checkpoint"

    @property
    def data(self) -> Path:
        return Path(self.folder) / "data"


def cases(shapes: tuple[str, ...]) -> list[Case]:
    """Return all cases of some shapes."""
    found = [Case("tests")]
    for shape in shapes:
        for quantized in (False, True):
            found += [Case("train", shape, quantized, program) for program in ("litlora", "PEFT")]
            found.append(Case("generate", shape, quantized))
    return found


def config_of(shape: str) -> GPTConfig:
    """Return the config of a shape."""
    import memory_table

    return GPTConfig.from_hub(TINY) if shape == TINY_SHAPE else memory_table.config(shape)
