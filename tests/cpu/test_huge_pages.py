import mmap

import pytest
import torch
from torch import nn

from litlora.cpu.huge_pages import ALIGNMENT, move_to_huge_pages
from litlora.models.checkpoint import Checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_moved_weights_are_unchanged(tiny, dtype):
    model, tokens = Checkpoint.open(tiny).load(dtype, torch.device("cpu")), torch.tensor([5, 6, 7])
    expected = model(tokens, [3])
    move_to_huge_pages(model.parameters())
    assert torch.equal(model(tokens, [3]), expected)


@pytest.mark.parametrize("huge", [True, False])
def test_transposed_weight_becomes_contiguous(huge, monkeypatch):
    if not huge:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    values = torch.randn(4, 3)
    weight = nn.Parameter(values.t())
    move_to_huge_pages([weight])
    assert weight.is_contiguous()
    assert torch.equal(weight, values.t())


def test_weights_are_contiguous_and_a_shared_one_is_moved_once():
    first, second = nn.Linear(5, 3), nn.Linear(5, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    move_to_huge_pages(model.parameters())
    assert second.weight is first.weight
    addresses = [weight.data_ptr() for weight in model.parameters()]
    assert [address - addresses[0] for address in addresses] == [0, ALIGNMENT, 2 * ALIGNMENT]
    assert [weight.numel() for weight in model.parameters()] == [15, 3, 3]
