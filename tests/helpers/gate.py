"""A run that waits before its fourth step until a file is there: what happens to it meanwhile comes in its midst.

Then it asks for more memory than it has had, so that a limit which came meanwhile is felt.
"""

import os
import sys
import time
from pathlib import Path

import torch

from litlora.__main__ import main
from litlora.train import loop


def wait_at(gate: Path) -> None:
    train_step = loop.train_step

    def waiting(run, batch, rate, step):
        while step == 4 and not gate.exists():
            time.sleep(0.01)
        if step == 4:
            torch.empty(100_000_000)  # pages that nobody touches cost nothing
        return train_step(run, batch, rate, step)

    loop.train_step = waiting


if __name__ != "tests.helpers.gate":  # also as multiprocessing names it in the processes that this one starts
    wait_at(Path(os.environ["GATE"]))
if __name__ == "__main__":
    sys.exit(main())
