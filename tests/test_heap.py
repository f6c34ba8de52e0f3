import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from litlora.heap import EVERY, KERNELS, keep_small
from litlora.linear import HAS_BFLOAT16_PRODUCTS

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


IN_USE = """
import ctypes
import torch
from litlora.heap import KERNELS, keep_few_kernels

names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
Counts = type("Counts", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
count = ctypes.CDLL(None).mallinfo2
count.restype = Counts

keep_few_kernels()
weight = torch.ones(64, 64, dtype=torch.bfloat16)
for number in range(1, 3 * KERNELS + 1):
    weight.new_ones(64 * number, 64) @ weight
    if number % KERNELS == 0:
        print(count().uordblks)
"""


@pytest.mark.skipif(not HAS_BFLOAT16_PRODUCTS, reason="oneDNN has no such products here")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="an old glibc")
def test_kernels_of_ever_new_shapes_make_room_for_each_other():
    environment = {name: value for name, value in os.environ.items() if "PRIMITIVE_CACHE" not in name}
    run = subprocess.run([sys.executable, "-c", IN_USE], env=environment, capture_output=True, text=True, check=True)
    first, second, third = map(int, run.stdout.split())
    assert third - second < 0.75 * KERNELS * 0.55e6  # half of what a kernel takes is never given back
    assert second > first
