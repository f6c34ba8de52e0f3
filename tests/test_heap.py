import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from litlora.heap import EVERY, keep_small

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
GAPS = 80e6


def resident() -> int:
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


class Holed(nn.Module):
    """A block that leaves gaps: of many small tensors, every second stays."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tensors = [torch.ones(int(GAPS) // 4000) for _ in range(2000)]
        self.kept = tensors[::2]
        return 2 * x


@pytest.fixture
def blocks() -> nn.ModuleList:
    blocks = nn.ModuleList([*(nn.Identity() for _ in range(EVERY - 1)), Holed()])
    keep_small(blocks)
    return blocks


def test_a_thread_has_its_memory_of_the_one_heap():
    code = """
import ctypes, re, threading
from litlora.heap import share_one
share_one()
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
places = []
thread = threading.Thread(target=lambda: places.append(malloc(1000)))
thread.start()
thread.join()
heap = re.search(r"^(\\w+)-(\\w+) .*\\[heap\\]$", open("/proc/self/maps").read(), re.MULTILINE)
start, end = (int(bound, 16) for bound in heap.groups())
assert start <= places[0] < end, (heap[0], hex(places[0]))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gaps_go_back_to_the_system_after_some_blocks_that_train(blocks):
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        nn.Sequential(*blocks)(x)
    with_gaps = resident()
    nn.Sequential(*blocks)(x)
    assert resident() < with_gaps - 0.8 * GAPS


def test_gaps_go_back_on_the_way_back_as_well(blocks):
    out = nn.Sequential(*blocks)(torch.ones(3, requires_grad=True))
    with torch.no_grad():
        blocks[-1](torch.ones(3))
    with_gaps = resident()
    out.sum().backward()
    assert resident() < with_gaps - 0.8 * GAPS
