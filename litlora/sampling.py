"""Next-token choice, and the token stream of a model with a KV cache."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from litlora.model import GPT, KVCache, evaluating


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen: temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def choose(self, logits: Tensor) -> Tensor:
        """Choose one of the logits (vocab,); top_k applies before top_p (nucleus sampling, Holtzman et al. 2019)."""
        if self.temperature == 0:
            return logits.argmax()
        count = min(self.top_k or len(logits), len(logits))
        values, indices = logits.float().topk(count)  # sorted, likeliest first
        probabilities = (values / self.temperature).softmax(dim=0)
        before = probabilities.cumsum(dim=0) - probabilities
        probabilities = probabilities.where(before < self.top_p, 0)  # the likeliest always stays
        return indices[probabilities.multinomial(1, generator=self.generator)[0]]


@torch.no_grad()
def generate(
    model: GPT, prompt: Sequence[int], sampler: Sampler, *, max_new_tokens: int, stop_ids: Collection[int]
) -> Iterator[int]:
    """Yield the tokens that follow the prompt, until a stop id (not yielded), the limit, or the last position."""
    weight = model.lm_head.weight
    length = min(len(prompt) + max_new_tokens, model.config.max_position_embeddings)
    cache = KVCache(model.config, length, weight.dtype, weight.device)
    tokens = torch.tensor(prompt, device=weight.device)
    with evaluating(model):
        for _ in range(length - len(prompt)):
            hidden = model(tokens, [len(tokens)], cache)
            chosen = sampler.choose(model.lm_head(hidden[-1:])[0])
            token = int(chosen)
            if token in stop_ids:
                return
            yield token
            tokens = chosen[None]
