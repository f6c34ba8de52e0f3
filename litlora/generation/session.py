"""The decode loop: a session with a KV cache, and the tokens that it generates."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from litlora.generation.sampler import Sampler, checked
from litlora.models.kv_cache import KVCache
from litlora.models.transformer import GPT, evaluating


class Session:
    """A model and the KV cache of one sequence, which grows with every call."""

    def __init__(self, model: GPT, max_length: int) -> None:
        weight = model.model.embed_tokens.weight
        self.model, self.device = model, weight.device
        self.cache = KVCache(model.config, max_length, weight.dtype, weight.device)
        self.tokens = torch.zeros(0, dtype=torch.long, device=self.device)

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Append tokens (T,) and return the logits (vocab,) after the last; only single tokens use compiled code.

        Where the sequence grows into other rotary frequencies, all of its tokens are computed again.
        """
        self.tokens = torch.cat((self.tokens, tokens))
        regimes = self.model.config.rope_regimes
        if regimes(self.cache.length) != regimes(self.cache.length + len(tokens)):
            tokens, self.cache.length = self.tokens, 0
        # A stance imports the compiler, which takes seconds.
        eager = self.model.is_compiled and len(tokens) > 1
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            hidden = self.model(tokens, [len(tokens)], self.cache)
            logits: Tensor = self.model.logits(hidden[-1:])
        return logits[0]


@torch.inference_mode()
def generate(
    model: GPT, prompt: Sequence[int], sampler: Sampler, *, max_new_tokens: int, stop_ids: Collection[int]
) -> Iterator[int]:
    """Yield the tokens that follow the prompt, until a stop id (not yielded), the limit, or the last position."""
    length = min(len(prompt) + max_new_tokens, model.config.positions)
    session = Session(model, length)
    tokens = torch.tensor(prompt, device=session.device)
    with evaluating(model):
        for _ in range(length - len(prompt)):
            chosen = sampler.choose(session.next_logits(tokens))
            token = checked(int(chosen))
            if token in stop_ids:
                return
            yield token
            tokens = chosen[None]
