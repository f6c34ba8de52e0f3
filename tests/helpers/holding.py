"""A rank that writes how many bytes of frozen weights it holds before the first of them is used."""

import os
import sys
from pathlib import Path

from torch.distributed.tensor import DTensor

import litlora.train.planned_run as command
from litlora.__main__ import main

if __name__ == "__main__":
    check_memory = command.check_memory

    def weighing(engine, *arguments):
        frozen = [p for p in engine.gpt.parameters() if not p.requires_grad]
        held = sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in frozen)
        Path(sys.argv[1], os.environ["RANK"]).write_text(str(held))
        check_memory(engine, *arguments)

    command.check_memory = weighing
    sys.exit(main(sys.argv[2:]))
