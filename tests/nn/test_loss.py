import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litlora.lora.layer import LoRALinear
from litlora.nn.loss import CHUNK, IGNORE_INDEX, supervised_loss

ROWS, WIDTH, VOCABULARY = 3 * CHUNK + 17, 24, 101


def problem(
    dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    """Return hidden states, a head, and labels of which a third are none."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCABULARY, (ROWS,))
    labels[torch.rand(ROWS) < 0.3] = IGNORE_INDEX
    return hidden.detach().to(device).requires_grad_(), head.to(device), labels.to(device)


def adapted_head(
    dtype: torch.dtype, device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, LoRALinear, torch.Tensor]:
    hidden, head, labels = problem(dtype, device)
    adapted = LoRALinear(head, rank=3, scaling=1.5, dropout=0.0)
    nn.init.normal_(adapted.lora_B.weight, std=0.3)
    return hidden, adapted.to(device), labels


def reference(hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return loss and gradients by full logits in float64."""
    double = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in head.named_parameters()}
    weight = double["weight"]
    if "lora_A.weight" in double:
        weight = weight + 1.5 * double["lora_B.weight"] @ double["lora_A.weight"]
    leaf = hidden.detach().double().requires_grad_()
    loss = F.cross_entropy(leaf @ weight.T, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    trainable = [p for p in double.values() if p.requires_grad]
    return loss, list(torch.autograd.grad(loss, [leaf, *trainable]))


def ours(hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = supervised_loss(hidden, head, labels)
    return loss, list(torch.autograd.grad(loss, [hidden, *(p for p in head.parameters() if p.requires_grad)]))


@pytest.mark.parametrize("make", [problem, adapted_head], ids=["frozen-head", "lora-head"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_loss_and_gradients_equal_full_logits_in_float64(make, dtype, tolerance, device):
    loss, gradients = ours(*make(dtype, device))
    exact_loss, exact_gradients = reference(*make(dtype, device))
    assert loss.dtype is torch.float32
    assert abs(loss.item() - exact_loss.item()) < tolerance * exact_loss.item()
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert (gradient.double() - exact).norm() < tolerance * exact.norm()


def test_gradient_is_scaled_with_the_loss():
    hidden, head, labels = adapted_head(torch.float32)
    parameters = [hidden, head.lora_A.weight, head.lora_B.weight]
    once = torch.autograd.grad(supervised_loss(hidden, head, labels), parameters)
    scaled = torch.autograd.grad(supervised_loss(hidden, head, labels) / 7, parameters)
    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close(a / 7, b)


def test_frozen_network_below_an_adapted_head_gets_no_gradient():
    hidden, head, labels = adapted_head(torch.float32)
    supervised_loss(hidden.detach(), head, labels).backward()
    assert hidden.grad is None
    assert head.lora_B.weight.grad.any()


def test_unsupervised_positions_change_nothing():
    hidden, head, labels = problem(torch.float32)
    loss = supervised_loss(hidden, head, labels)
    with torch.no_grad():
        hidden[labels == IGNORE_INDEX] += 5
    assert torch.equal(loss, supervised_loss(hidden, head, labels))


def test_loss_without_gradients():
    hidden, head, labels = adapted_head(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(supervised_loss(hidden, head, labels), supervised_loss(*adapted_head(torch.float32)))


MEMORY = """
import resource, sys, torch
from litlora.nn.linear import Linear
from litlora.lora.layer import LoRALinear
from litlora.nn.loss import supervised_loss

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB

torch.set_num_threads(1)
dtype, adapted, rows = getattr(torch, sys.argv[1]), sys.argv[2] == "lora", int(sys.argv[3])
head = Linear(64, 131_072, bias=False, dtype=dtype).requires_grad_(False)
head = LoRALinear(head, rank=8, scaling=1.0, dropout=0.0) if adapted else head
hidden = torch.randn(rows, 64, dtype=dtype, requires_grad=True)
supervised_loss(hidden[:1], head, torch.zeros(1, dtype=torch.int64)).backward()
before = peak()
supervised_loss(hidden, head, torch.randint(131_072, (rows,))).backward()
print(peak() - before)
"""


@pytest.mark.parametrize(("dtype", "head"), [("bfloat16", "frozen"), ("float32", "lora")])
def test_large_vocabulary_adds_less_than_300_mb(dtype, head):
    added = [
        float(subprocess.run([sys.executable, "-c", MEMORY, dtype, head, str(rows)], capture_output=True).stdout)
        for rows in (256, 512)
    ]
    assert max(added) < 300
    assert added[1] < added[0] + 20  # it does not grow with the number of tokens


def test_logits_exist_one_chunk_at_once():
    hidden, head, labels = problem(torch.float32)
    seen = []
    head.register_forward_hook(lambda module, inputs, logits: seen.append(len(logits)))
    supervised_loss(hidden, head, labels)
    assert max(seen) == CHUNK
    assert sum(seen) == (labels != IGNORE_INDEX).sum()
