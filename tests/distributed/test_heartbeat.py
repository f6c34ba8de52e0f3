"""A rank counts as dead when it is, and not for being slow."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUSY = """
import time
from torch.distributed import HashStore
from litlora.distributed import heartbeat
from litlora.distributed.launcher import RankInfo

heartbeat.BEAT = 0.05  # a limit of little more than a second
store = HashStore()
first, second = (heartbeat.Monitor(RankInfo(rank, 2, 2), store) for rank in range(2))
print("ready", flush=True)
end = time.monotonic() + 4
while time.monotonic() < end:
    sum(range(10**6))
assert first.missing is None or second.missing is None
second.leave()
first.leave()
second.stop()
first.stop()
"""


def test_busy_or_suspended_ranks_are_not_given_up():
    ranks = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert ranks.stdout.readline() == b"ready\n"
    ranks.send_signal(signal.SIGSTOP)
    time.sleep(2)
    ranks.send_signal(signal.SIGCONT)
    ranks.communicate(timeout=600)
    assert ranks.returncode == 0
