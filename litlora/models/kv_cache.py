"""KV caches: of one sequence, and of several that are decoded together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from litlora.models.config import GPTConfig
from litlora.nn.attention import attend_each
from litlora.nn.attention_spec import AttentionSpec
from litlora.nn.backend import backend
from litlora.nn.backend_interface import Span


class Cache(Protocol):
    """What the decoder needs of a cache."""

    @property
    def starts(self) -> Sequence[int]:
        """The position at which each sequence continues."""

    def grow(self, lengths: Sequence[int]) -> "Sequence[Tensor | Slots]":
        """Extend each sequence by some positions, and return what each layer reads and writes."""


class KVCache:
    """Keys and values of the tokens of one sequence, in memory that is allocated once."""

    def __init__(self, config: GPTConfig, max_length: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, max_length, config.head_dim)
        self.store = torch.empty(shape, dtype=dtype, device=device)
        self.windows: list[int | None] = [spec.window for spec in config.attention_specs]
        self.length = 0

    @property
    def starts(self) -> Sequence[int]:
        return (self.length,)

    def grow(self, lengths: Sequence[int]) -> list[Tensor]:
        """Extend the cache, and return the keys and values that the new positions see in each layer.

        They are a tensor (2, n_kv, seen, head_dim), whose last `count` positions the layer writes. Were they cut within
        the layer, its code would be compiled twice: for less than a window, and for more.
        """
        (count,) = lengths
        self.length += count
        firsts = (0 if window is None else max(0, self.length - count - window + 1) for window in self.windows)
        return [layer[:, :, first : self.length] for layer, first in zip(self.store, firsts, strict=True)]

    def reserve(self, length: int) -> None:
        """Make room for sequences of a length, in twice as much memory as before if it is too little."""
        *sizes, capacity, width = self.store.shape
        if length > capacity:
            store = self.store.new_empty((*sizes, max(length, 2 * capacity), width))
            store[:, :, :, : self.length] = self.store[:, :, :, : self.length]
            self.store = store


@dataclass(frozen=True)
class Rows:
    """Where the keys and values of a packed sequence belong: a slot and a position for each token."""

    slots: Tensor
    """(T,)"""
    positions: Tensor
    """(T,)"""


@dataclass(frozen=True)
class Slots:
    """What one layer reads and writes in the cache of several sequences."""

    store: Tensor
    """Its keys and values (2, slots, n_kv, max_length, head_dim)."""
    rows: Rows
    seen: "Seen | None"
    """What the sequences see, one token of each; None where they start."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], spec: AttentionSpec) -> Tensor:
        """Store keys and values (T, n_kv, head_dim), and return the attention (T, n_head, head_dim)."""
        for stored, new in zip(self.store, (k, v), strict=True):
            stored[self.rows.slots, :, self.rows.positions] = new
        if self.seen is None:
            return backend(q.device).varlen_attention(q, k, v, spans, spec)
        first, mask = self.seen.mask(spec.window)
        keys, values = self.store[:, : len(q), :, first : self.seen.longest]
        return attend_each(q, keys, values, mask, spec)


class Seen:
    """Which positions the last token of each sequence sees."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.shortest, self.longest = min(lengths), max(lengths)
        self.ends = torch.tensor(lengths, device=device)[:, None]
        self.masks: dict[int | None, tuple[int, Tensor]] = {}

    def mask(self, window: int | None) -> tuple[int, Tensor]:
        """Return the first position that any of them sees, and which each sees from there on (B, S)."""
        if window not in self.masks:
            first = 0 if window is None else max(0, self.shortest - window)
            positions = torch.arange(first, self.longest, device=self.ends.device)
            mask = positions < self.ends
            self.masks[window] = first, mask if window is None else mask & (positions >= self.ends - window)
        return self.masks[window]


class BatchCache:
    """Keys and values of several sequences, each in a slot of its own; the first slots are those in use."""

    def __init__(
        self, config: GPTConfig, slots: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, 2, slots, config.num_key_value_heads, max_length, config.head_dim)
        # What a sequence does not see has the weight 0, which makes no number of what uninitialized memory may hold.
        self.store = torch.zeros(shape, dtype=dtype, device=device)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of a slot to another one."""
        self.store[:, :, target, :, :length] = self.store[:, :, source, :, :length]

    def filling(self, slots: Sequence[int]) -> "Filling":
        """Return the cache as sequences see it that start in some slots."""
        return Filling(self.store, slots)

    def extending(self, lengths: Sequence[int]) -> "Extending":
        """Return the cache as the sequences of the first slots see it, which have these lengths, for one token more."""
        return Extending(self.store, lengths)


@dataclass(frozen=True)
class Filling:
    """Slots whose sequences start."""

    store: Tensor
    slots: Sequence[int]

    @property
    def starts(self) -> Sequence[int]:
        return [0] * len(self.slots)

    def grow(self, lengths: Sequence[int]) -> list[Slots]:
        device = self.store.device
        slots = torch.tensor(self.slots, device=device).repeat_interleave(torch.tensor(lengths, device=device))
        rows = Rows(slots, torch.cat([torch.arange(length, device=device) for length in lengths]))
        return [Slots(layer, rows, None) for layer in self.store]


@dataclass(frozen=True)
class Extending:
    """The first slots, whose sequences grow by one token each."""

    store: Tensor
    starts: Sequence[int]

    def grow(self, lengths: Sequence[int]) -> list[Slots]:
        device = self.store.device
        rows = Rows(torch.arange(len(self.starts), device=device), torch.tensor(self.starts, device=device))
        seen = Seen([start + 1 for start in self.starts], device)
        return [Slots(layer, rows, seen) for layer in self.store]
