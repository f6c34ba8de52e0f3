"""The flags of verify."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from litlora.args.common import CommandArgs

EngineName = Literal["litlora", "peft", "llama.cpp"]


@dataclass(frozen=True)
class VerifyArgs(CommandArgs):
    """Compare what an adapter, a merged checkpoint or a GGUF file computes with the receipt of its training."""

    examples: ClassVar = ("litlora verify out/alpaca/final", "litlora verify out/merged --engine peft")

    checkpoint_dir: Path
    """Folder of the adapter, of the merged checkpoint or of a GGUF file, with its receipt.json."""
    base_dir: Path | None = None
    """Folder of the adapter's base, by default the one in its adapter_config.json; or its base's GGUF file."""
    engine: EngineName | None = None
    """What computes, by default llama.cpp for a GGUF file, else litlora; peft is transformers with PEFT."""
