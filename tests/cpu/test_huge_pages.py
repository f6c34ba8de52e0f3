import mmap

import pytest
import torch
from torch import nn

from litlora.cpu.huge_pages import ALIGNMENT, settle
from litlora.models.checkpoint import Checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_weights_that_lie_end_to_end_are_what_they_were(tiny, dtype):
    model, tokens = Checkpoint.open(tiny).load(dtype, torch.device("cpu")), torch.tensor([5, 6, 7])
    expected = model(tokens, [3])
    settle(model.parameters())
    assert torch.equal(model(tokens, [3]), expected)


@pytest.mark.parametrize("huge", [True, False])
def test_a_weight_seen_from_its_side_becomes_contiguous(huge, monkeypatch):
    if not huge:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    numbers = torch.randn(4, 3)
    weight = nn.Parameter(numbers.t())
    settle([weight])
    assert weight.is_contiguous()
    assert torch.equal(weight, numbers.t())


def test_weights_lie_next_to_each_other_and_one_of_two_layers_is_there_once():
    first, second = nn.Linear(5, 3), nn.Linear(5, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    settle(model.parameters())
    assert second.weight is first.weight
    places = [weight.data_ptr() for weight in model.parameters()]
    assert [place - places[0] for place in places] == [0, ALIGNMENT, 2 * ALIGNMENT]
    assert [weight.numel() for weight in model.parameters()] == [15, 3, 3]


def test_a_weight_that_is_not_on_a_cpu_stays_as_it_is():
    weight = nn.Linear(5, 3, device="meta").weight
    settle([weight])
    assert weight.is_meta
