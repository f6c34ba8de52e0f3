"""The decode loop: the token stream of a model with a KV cache."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from litlora.generation.sampler import Sampler, checked
from litlora.models.kv_cache import KVCache
from litlora.models.transformer import GPT, evaluating


@torch.inference_mode()
def generate(
    model: GPT, prompt: Sequence[int], sampler: Sampler, *, max_new_tokens: int, stop_ids: Collection[int]
) -> Iterator[int]:
    """Yield the tokens that follow the prompt, until a stop id (not yielded), the limit, or the last position."""
    weight = model.model.embed_tokens.weight
    length = min(len(prompt) + max_new_tokens, model.config.max_position_embeddings)
    cache = KVCache(model.config, length, weight.dtype, weight.device)
    tokens = torch.tensor(prompt, device=weight.device)
    with evaluating(model):
        for _ in range(length - len(prompt)):
            chosen = sampler.choose(next_logits(model, tokens, cache))
            token = checked(int(chosen))
            if token in stop_ids:
                return
            yield token
            tokens = chosen[None]


def next_logits(model: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """Return the logits (vocab,) behind tokens (T,); several at once go through the model as it was written."""
    # A stance imports the compiler, which takes seconds.
    with torch.compiler.set_stance("force_eager") if model.is_compiled and len(tokens) > 1 else nullcontext():
        logits: Tensor = model.lm_head(model(tokens, [len(tokens)], cache)[-1:])
    return logits[0]
