import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from litlora.cpu.onednn import HAS_BFLOAT16_PRODUCTS
from litlora.nn.cuda_backend import disable_cudnn_attention

TRAINING = """
import random, sys
from pathlib import Path
import torch
from litlora.data.batching import Sample, optimize_layout, pack
from litlora.models.checkpoint import Checkpoint
from litlora.lora.config import LoRAConfig
from litlora.lora.layer import add_lora
from litlora.nn.backend import backend
from litlora.nn.loss import supervised_loss

cpu = torch.device("cpu")
gpt = Checkpoint.open(Path(sys.argv[1])).load(torch.bfloat16, cpu)
add_lora(gpt, LoRAConfig(2, 2, 0.1, ("q_proj", "down_proj")))
random.seed(1)
for number in range(60):
    tokens = [torch.randint(300, (random.randrange(20, 100),)) for _ in range(4)]
    micro = pack([Sample(some, some) for some in tokens])
    micro = optimize_layout(micro, backend(cpu), torch.bfloat16, gpt.config.rope_regimes)
    supervised_loss(gpt(micro.tokens, micro.lengths, shared=micro.shared), gpt.lm_head, micro.labels).backward()
"""


@pytest.mark.skipif(not HAS_BFLOAT16_PRODUCTS, reason="oneDNN has no such products here")
def test_micro_batches_of_many_lengths_have_few_shapes(tiny):
    environment = {"ONEDNN_VERBOSE": "profile_create", "PATH": ""}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", TRAINING, tiny]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    written = [line for line in run.stdout.splitlines() if ",create:cache_miss," in line]
    assert 20 < len(written) < 220  # of several hundred, were lengths not rounded


@pytest.mark.gpu
def test_attention_on_cuda_is_not_cudnn():
    disable_cudnn_attention()
    q = torch.ones(1, 4, 100, 64, dtype=torch.bfloat16, device="cuda")
    assert SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)) == SDPBackend.FLASH_ATTENTION
