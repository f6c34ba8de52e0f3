import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from litlora.sampling import Sampler

DRAWS = 20_000


def frequencies(sampler: Sampler, logits: torch.Tensor) -> torch.Tensor:
    draws = torch.stack([sampler.choose(logits) for _ in range(DRAWS)])
    return draws.bincount(minlength=len(logits)) / DRAWS


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, 1.0), (0.6, 5, 1.0), (1.7, None, 0.7), (0.9, 6, 0.8)]
)
def test_tokens_come_as_often_as_transformers_says(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(12)
    warped = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    expected = TopPLogitsWarper(top_p)(None, warped).softmax(dim=-1)[0]
    found = frequencies(Sampler(temperature, top_k, top_p, torch.Generator().manual_seed(1)), logits)
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)
    assert not found[expected == 0].any()


def test_temperature_0_takes_the_likeliest():
    assert Sampler(0.0, 50, 0.1).choose(torch.tensor([1.0, 3.0, 2.0])) == 1
