"""Continuous batching: many prompts are completed together, and one that waits takes the slot of one that ends."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from litlora.generation.sampler import Sampler, checked
from litlora.generation.session import eagerly
from litlora.models.kv_cache import BatchCache, Extending, Filling
from litlora.models.transformer import GPT, evaluating

PREFILL_TOKENS = 4096
"""Tokens of prompts that are computed at once, if more than one prompt is."""


def never(token: int) -> bool:
    """Let the completion continue after any token."""
    return False


@dataclass(frozen=True)
class Request:
    """A prompt to complete."""

    prompt: Sequence[int]
    max_new_tokens: int
    ends_with: Callable[[int], bool] = never
    """Whether a token, with those that it has seen before, ends the completion."""
    generator: torch.Generator | None = None

    def max_length(self, positions: int) -> int:
        """Return the length at which its sequence ends in a model of some positions."""
        return max(len(self.prompt), min(len(self.prompt) + self.max_new_tokens, positions))


@dataclass
class Running:
    """A sequence that grows."""

    number: int
    """Which of the requests it is."""
    request: Request
    max_length: int
    tokens: list[int] = field(init=False)
    """Of prompt and completion."""
    cached: int = 0
    """How many of them have keys and values in the cache."""
    has_ended: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.has_ended = len(self.tokens) == self.max_length

    @property
    def completion(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[len(self.request.prompt) :]

    def append(self, token: int, stop_ids: Collection[int]) -> None:
        """Append a token, unless it is a stop id, which ends the sequence as its last token does."""
        if token in stop_ids:
            self.has_ended = True
            return
        self.tokens.append(token)
        self.has_ended = len(self.tokens) == self.max_length or self.request.ends_with(token)


@torch.inference_mode()
def complete_all(
    model: GPT,
    requests: Sequence[Request],
    sampler: Sampler,
    *,
    stop_ids: Collection[int],
    batch_size: int,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yield the number of each request and the tokens of its completion, as they end.

    At most `batch_size` sequences run at a time, the longest first, so that what does not fit in memory shows soon.
    `dtype` is that of the products, if it is not that of the weights.
    """
    positions = model.config.positions
    waiting = [Running(n, request, request.max_length(positions)) for n, request in enumerate(requests)]
    yield from ((each.number, []) for each in waiting if each.has_ended)
    waiting = sorted((each for each in waiting if not each.has_ended), key=lambda each: -each.max_length)
    if waiting:
        batch = Batch(model, waiting, batch_size, dtype)
        with evaluating(model):
            while batch.running:
                for ended in batch.step(sampler, stop_ids):
                    yield ended.number, ended.completion


class Batch:
    """The sequences that run, each in a slot of the cache, and those that wait for one."""

    def __init__(self, model: GPT, sequences: Sequence[Running], slots: int, dtype: torch.dtype | None = None) -> None:
        weight = model.model.embed_tokens.weight
        self.model, self.device = model, weight.device
        self.running, self.waiting = list(sequences[:slots]), deque(sequences[slots:])
        longest = max(each.max_length for each in sequences)
        self.cache = BatchCache(model.config, len(self.running), longest, dtype or weight.dtype, weight.device)

    def step(self, sampler: Sampler, stop_ids: Collection[int]) -> Iterator[Running]:
        """Append a token to the sequences that must be computed from their start, if any, else to all; yield the ended.

        The others wait meanwhile, so that the slots of all that take a step of one token are next to each other.
        """
        starting = self._starting()
        slots = starting or range(len(self.running))
        cached = [each.cached for each in self.running]
        logits = self._next_logits(slots, self.cache.filling(slots) if starting else self.cache.extending(cached))
        chosen = sampler.choose_each(logits, [self.running[slot].request.generator for slot in slots])
        for slot, token in zip(slots, chosen.tolist(), strict=True):
            self.running[slot].append(checked(token), stop_ids)
        for slot in reversed(slots):
            if self.running[slot].has_ended:
                yield self._replace(slot)

    def _starting(self) -> list[int]:
        """Return the slots to compute from their start: new ones, and those that grow into other rotary frequencies."""
        regimes, tokens = self.model.config.rope_regimes, 0
        slots: list[int] = []
        for slot, each in enumerate(self.running):
            length = len(each.tokens)
            if not each.cached or regimes(each.cached) != regimes(length):
                tokens += length
                if slots and tokens > PREFILL_TOKENS:
                    break
                slots.append(slot)
        return slots

    def _next_logits(self, slots: Sequence[int], view: Filling | Extending) -> Tensor:
        """Compute the tokens that are not in the cache; return the logits after the last of each (slots, vocab)."""
        sequences = [self.running[slot] for slot in slots]
        new = [each.tokens[start:] for each, start in zip(sequences, view.starts, strict=True)]
        lengths = [len(tokens) for tokens in new]
        last = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        with eagerly(self.model):
            hidden = self.model(torch.tensor([*chain.from_iterable(new)], device=self.device), lengths, view)
            logits: Tensor = self.model.logits(hidden[last])
        for each in sequences:
            each.cached = len(each.tokens)
        return logits

    def _replace(self, slot: int) -> Running:
        """Give a slot to the next sequence that waits, or else to the last that runs; return the one that had it."""
        ended = self.running[slot]
        if self.waiting:
            self.running[slot] = self.waiting.popleft()
            return ended
        last = self.running.pop()
        if last is not ended:
            self.cache.move(len(self.running), slot, last.cached)
            self.running[slot] = last
        return ended
