"""What the processes do that the launcher's tests start. Nothing heavy is imported, since each of them waits for it."""

import os
import signal
import time
from collections.abc import Sequence

from litlora.distributed.launcher import LEFT_ALONE


def attempt(ends: Sequence[str]) -> tuple[int, str | None]:
    """Be a rank that ends as its word describes."""
    end = ends[int(os.environ["RANK"])]
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while end == "hangs":
        time.sleep(1)
    if end == "says why":
        return 4, f"of rank {os.environ['RANK']}"
    return {"ends well": 0, "ends": 5, "is left alone": LEFT_ALONE}[end], None


def tell_threads(arguments: Sequence[str]) -> tuple[int, str | None]:
    import torch

    return 1, f"{torch.get_num_threads()} threads"
