"""The flags of verify."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from litlora.args.common import CommandArgs


@dataclass(frozen=True)
class VerifyArgs(CommandArgs):
    """Compare what an adapter or a merged checkpoint computes with the receipt of its training."""

    examples: ClassVar = ("litlora verify out/alpaca/final", "litlora verify out/merged")

    checkpoint_dir: Path
    """Folder of the adapter or of the merged checkpoint, with its receipt.json."""
    base_dir: Path | None = None
    """Folder of the adapter's base, by default the one in its adapter_config.json."""
