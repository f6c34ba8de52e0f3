"""A run that waits before its fourth step until a file is there: what happens to it meanwhile comes in its midst.

Then it asks for more memory than it has had, so that a limit which came meanwhile is felt.
"""

import importlib
import os
import sys
import time
from pathlib import Path
from types import ModuleType

from litlora.__main__ import main


def wait_at(gate: Path) -> None:
    import torch

    from litlora.train import loop

    train_step = loop.train_step

    def waiting(run, batch, rate, step):
        while step == 4 and not gate.exists():
            time.sleep(0.01)
        if step == 4:
            torch.empty(100_000_000)  # pages that nobody touches cost nothing
        return train_step(run, batch, rate, step)

    loop.train_step = waiting


def wait_once_imported(import_module=importlib.import_module) -> None:
    """Have this process wait if it imports a command: one that launches others does not, and needs no torch."""

    def load(name: str, package: str | None = None) -> ModuleType:
        module = import_module(name, package)
        if name.startswith("litlora.commands."):
            wait_at(Path(os.environ["GATE"]))
        return module

    importlib.import_module = load


if __name__ == "__main__":
    wait_once_imported()
    sys.exit(main())
