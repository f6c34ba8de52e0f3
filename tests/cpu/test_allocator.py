import ctypes
import os
import subprocess
import sys

import pytest

from litlora.cpu.environment import NO_CACHES, TUNABLES

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")


def say(code: str, *arguments: str, **environment: str) -> list[str]:
    """Run a program, and return the lines that it prints."""
    command, env = [sys.executable, "-c", code, *arguments], os.environ | environment
    return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


SUITED = """
import ctypes, re
from litlora.cpu.allocator import configure_for_training

def heap():
    found = re.search(r"^(\\w+)-(\\w+) .*\\[heap\\]$", open("/proc/self/maps").read(), re.MULTILINE)
    return range(*(int(bound, 16) for bound in found.groups()))

configure_for_training()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
"""


def test_threads_share_one_heap():
    code = """
import threading
addresses = []
thread = threading.Thread(target=lambda: addresses.append(library.malloc(1000)))
thread.start()
thread.join()
assert addresses[0] in heap(), (heap(), hex(addresses[0]))
"""
    say(SUITED + code)


def test_large_tensors_stay_in_the_heap():
    code = """
addresses = [library.malloc(20_000_000) for _ in range(8)]
print(all(address in heap() for address in addresses))
for address in addresses:
    library.free(address)
print(addresses[-1] in heap())
"""
    assert say(SUITED + code) == ["True", "True"]


def test_medium_tensors_have_pages_of_their_own_where_memory_is_tight():
    code = """
configure_for_training(tight=True)
addresses = [library.malloc(20_000_000) for _ in range(8)]  # beyond what the heap has already
print(any(address in heap() for address in addresses[4:]), library.malloc(1_000_000) in heap())
"""
    assert say(SUITED + code) == ["False True"]


def test_freed_activations_are_reused():
    code = """
import ctypes
import torch
from litlora.models.config import GPTConfig
from litlora.lora.config import LoRAConfig
from litlora.lora.layer import add_lora
from litlora.models.transformer import GPT
counts = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
Info = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in counts.split()]})
library = ctypes.CDLL(None)
library.mallinfo2.restype = Info
torch.set_num_threads(1)
gpt = GPT(GPTConfig.from_hub(dict(
    model_type="llama", vocab_size=200, hidden_size=48, intermediate_size=128, num_hidden_layers=40,
    num_attention_heads=6, head_dim=8, num_key_value_heads=2, max_position_embeddings=512,
)))
add_lora(gpt, LoRAConfig(4, 16, 0.1, ("q_proj", "v_proj")))
for length in 500, 400, 450, 500:
    out = gpt(torch.arange(length) % 200, (length,))
    info = library.mallinfo2()
    out.sum().backward()
    del out
print(info.uordblks, info.fordblks)
"""
    settings = {TUNABLES: ":".join(NO_CACHES)}
    kept, free = map(int, say(code, **settings)[0].split())
    assert kept > 100e6
    assert free < kept / 5  # more than a quarter with glibc as it is
