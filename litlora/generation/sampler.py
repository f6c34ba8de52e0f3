"""Choosing the next token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from litlora.args.inference import Sampling
from litlora.errors import CORRUPT_WEIGHTS, LitLoraError

COLDEST = 1e-30  # as good as greedy, and no logit becomes infinite


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen: temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    generator: torch.Generator | None = None

    @classmethod
    def of(cls, sampling: Sampling, device: torch.device) -> Self:
        """Return a sampler with these settings."""
        generator = torch.Generator(device).manual_seed(sampling.seed)
        return cls(sampling.temperature, sampling.top_k, sampling.top_p, generator)

    def choose(self, logits: Tensor) -> Tensor:
        """Choose one of the logits (vocab,), or -1 where they are not finite."""
        return self.choose_each(logits[None], [self.generator])[0]

    def choose_each(self, logits: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
        """Choose one in each row of the logits (rows, vocab), with a generator of its own, or -1 as above.

        top_k applies before top_p (nucleus sampling, Holtzman et al. 2019).
        """
        if self.temperature == 0:
            best, index = logits.float().max(dim=1)  # bfloat16 takes a CPU three times as long
            return index.where(best.isfinite(), -1)
        count = min(self.top_k or logits.shape[1], logits.shape[1])
        values, indices = logits.float().topk(count)  # sorted, likeliest first
        finite = values[:, :1].isfinite()
        probabilities = (values / max(self.temperature, COLDEST)).softmax(dim=1).where(finite, 1)
        before = probabilities.cumsum(dim=1) - probabilities
        probabilities = probabilities.where(before < self.top_p, 0)  # the likeliest always stays
        pairs = zip(probabilities, generators, strict=True)
        drawn = torch.cat([row.multinomial(1, generator=generator) for row, generator in pairs])
        return indices.gather(1, drawn[:, None]).where(finite, -1)[:, 0]


def checked(token: int) -> int:
    """Return a chosen token, which is negative where there was nothing to choose from."""
    if token < 0:
        raise LitLoraError(f"the model's scores for the next token are NaN or infinite: {CORRUPT_WEIGHTS}")
    return token
