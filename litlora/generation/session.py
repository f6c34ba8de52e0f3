"""The decode loop: a session with a KV cache, and the tokens that it generates."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from litlora.generation.sampler import Sampler, checked
from litlora.models.kv_cache import KVCache
from litlora.models.transformer import GPT, evaluating


def eagerly(model: GPT) -> AbstractContextManager[None]:
    """Return a context in which compiled code is not used: it is for single tokens of one sequence."""
    # A stance imports the compiler, which takes seconds.
    return torch.compiler.set_stance("force_eager") if model.is_compiled else nullcontext()


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
        with eagerly(self.model) if len(tokens) > 1 else nullcontext():
            hidden = self.model(tokens, [len(tokens)], self.cache)
            logits: Tensor = self.model.logits(hidden[-1:])
        return logits[0]

    @torch.inference_mode()
    def rewind(self, length: int) -> None:
        """Forget the tokens after the first `length`; these are computed again if their rotary frequencies differ."""
        regimes, kept = self.model.config.rope_regimes, self.tokens[:length]
        changed = regimes(self.cache.length) != regimes(length)
        self.tokens, self.cache.length = kept, length
        if changed:
            self.tokens, self.cache.length = kept[:0], 0
            if length:
                self.next_logits(kept)

    def switch_to(self, tokens: Tensor) -> Tensor:
        """Make tokens (T,) the sequence, and return the logits (vocab,) after the last; what is cached stays."""
        most = min(len(tokens) - 1, len(self.tokens))
        different = (tokens[:most] != self.tokens[:most]).nonzero()
        common = int(different[0]) if len(different) else most
        self.rewind(common)
        return self.next_logits(tokens[common:])


def generate(
    model: GPT, prompt: Sequence[int], sampler: Sampler, *, max_new_tokens: int, stop_ids: Collection[int]
) -> Iterator[int]:
    """Yield the tokens that follow the prompt, until a stop id (not yielded), the limit, or the last position."""
    yield from next(generate_samples(model, prompt, sampler, 1, max_new_tokens=max_new_tokens, stop_ids=stop_ids))


@torch.inference_mode()
def generate_samples(
    model: GPT, prompt: Sequence[int], sampler: Sampler, count: int, *, max_new_tokens: int, stop_ids: Collection[int]
) -> Iterator[Iterator[int]]:
    """Yield several completions of a prompt, which is computed once; each must be read before the next."""
    length = min(len(prompt) + max_new_tokens, model.config.positions)
    if length <= len(prompt):
        yield from (iter(()) for _ in range(count))
        return
    session = Session(model, length)
    with evaluating(model):
        logits = session.next_logits(torch.tensor(prompt, device=session.device))
    for _ in range(count):
        with evaluating(model):
            session.rewind(len(prompt))
        yield complete(session, logits, sampler, length - len(prompt), stop_ids)


@torch.inference_mode()
def complete(
    session: Session, logits: Tensor, sampler: Sampler, limit: int, stop_ids: Collection[int]
) -> Iterator[int]:
    """Yield the tokens that follow those of a session, given the logits after these."""
    with evaluating(session.model):
        for n in range(1, limit + 1):
            chosen = sampler.choose(logits)
            token = checked(int(chosen))
            if token in stop_ids:
                return
            yield token
            if n < limit:
                logits = session.next_logits(chosen[None])
