import ctypes
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend

from litlora.kernels import KERNELS, make_few_kernels
from litlora.linear import HAS_BFLOAT16_PRODUCTS

IN_USE = """
import ctypes
import torch
from litlora.kernels import KERNELS, make_few_kernels

names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
Counts = type("Counts", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
count = ctypes.CDLL(None).mallinfo2
count.restype = Counts

make_few_kernels()
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


@pytest.mark.gpu
def test_attention_on_a_gpu_is_not_that_which_plans_for_each_length():
    make_few_kernels()
    q = torch.ones(1, 4, 100, 64, dtype=torch.bfloat16, device="cuda")
    assert SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)) == SDPBackend.FLASH_ATTENTION
