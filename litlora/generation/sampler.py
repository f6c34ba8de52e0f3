"""Choosing the next token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from litlora.errors import CORRUPT_WEIGHTS, LitLoraError


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen: temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def choose(self, logits: Tensor) -> Tensor:
        """Choose one of the logits (vocab,), or -1 where they are not finite.

        top_k applies before top_p (nucleus sampling, Holtzman et al. 2019).
        """
        if self.temperature == 0:
            best, index = logits.float().max(dim=0)  # bfloat16 takes a CPU three times as long
            return index.where(best.isfinite(), -1)
        count = min(self.top_k or len(logits), len(logits))
        values, indices = logits.float().topk(count)  # sorted, likeliest first
        finite = values[0].isfinite()
        probabilities = (values / self.temperature).softmax(dim=0).where(finite, 1)
        before = probabilities.cumsum(dim=0) - probabilities
        probabilities = probabilities.where(before < self.top_p, 0)  # the likeliest always stays
        return indices[probabilities.multinomial(1, generator=self.generator)[0]].where(finite, -1)


def checked(token: int) -> int:
    """Return a chosen token, which is negative where there was nothing to choose from."""
    if token < 0:
        raise LitLoraError(f"the model's scores for the next token are NaN or infinite: {CORRUPT_WEIGHTS}")
    return token
