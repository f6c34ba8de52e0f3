"""Samples, global batches and packed micro-batches."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from itertools import pairwise
from operator import itemgetter
from typing import Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from litlora.args import TrainArgs
from litlora.data.encoding import Tokens
from litlora.nn.backend import Backend
from litlora.nn.loss import IGNORE_INDEX

T = TypeVar("T")
PROMISING = 100  # global batches among which the longest micro-batch is looked for


@dataclass(frozen=True)
class Sample:
    """An example as the model sees it: labels[i] is the token that follows tokens[i], or IGNORE_INDEX."""

    tokens: Tensor
    labels: Tensor
    row: int = 0
    """Which row of the split it is, counted from 1; 0 for none."""

    @property
    def supervised(self) -> int:
        """How many of the tokens have a label."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class MicroBatch:
    """Samples end to end in one row: tokens (T,), labels (T,), and the length of each sample."""

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    shared: tuple[int, ...] = ()
    """How many tokens stand before each sample's own that are those of the sample before it; () for none."""
    seed: int = 0
    """Decides its dropout."""

    @property
    def supervised(self) -> int:
        """How many of the tokens have a label."""
        return int((self.labels != IGNORE_INDEX).sum())


DUMMY_MICRO_BATCH = MicroBatch(torch.zeros(1, dtype=torch.long), torch.full((1,), IGNORE_INDEX), (1,))
"""For a rank that has less to do than another: where weights are sharded, all must go through the model as often."""


@dataclass(frozen=True)
class Batching:
    """How samples become global batches and micro-batches."""

    global_batch_size: int
    micro_batch_size: int
    micro_batch_tokens: int | None = None

    @classmethod
    def of(cls, train: TrainArgs) -> Self:
        """Take the settings that matter here."""
        return cls(train.global_batch_size, train.micro_batch_size, train.micro_batch_tokens)

    def micro_batches(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        """Split a global batch, or a rank's share of it."""
        return micro_batches(samples, self.micro_batch_size, self.micro_batch_tokens)


class Samples:
    """The examples of a split, cut to `max_seq_length` tokens; each becomes a sample when it is asked for.

    The last token of a text is only ever a label, so an example that fits keeps its EOS.
    """

    def __init__(self, tokens: Tokens, max_seq_length: int) -> None:
        whole = np.diff(tokens.offsets) - 1
        lengths = np.minimum(whole, max_seq_length).astype(np.int32)
        has_label = tokens.first_labels < lengths
        self._tokens = tokens
        self._rows = None if has_label.all() else np.flatnonzero(has_label)
        self.lengths = lengths[has_label]
        """How many tokens each sample has."""
        self.cut = int((whole > max_seq_length).sum())
        """How many of the split's examples are longer."""
        self.dropped = len(whole) - len(self.lengths)
        """How many of them have not one label left."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        row = index if self._rows is None else int(self._rows[index])
        stored = torch.from_numpy(self._tokens.example(row, int(self.lengths[index]))).long()
        tokens = torch.where(stored < 0, ~stored, stored)
        return Sample(tokens[:-1], torch.where(stored < 0, IGNORE_INDEX, stored)[1:], row + 1)


def epoch_order(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the numbers of samples in the order of an epoch, which follows from seed and epoch alone."""
    order: NDArray[np.int64] = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).numpy()
    return order


def longest_micro_batch(
    samples: Samples, orders: Iterable[NDArray[np.int64]], train: TrainArgs, ranks: int
) -> list[Sample]:
    """Return the samples of the micro-batch with the most tokens, of all global batches of these orders."""
    groups = [
        [share[place] for place in group]
        for batch in _promising(samples.lengths, orders, train, ranks)
        for share in filter(None, split_across_ranks(batch, samples.lengths[batch].tolist(), ranks))
        for group in split(samples.lengths[share].tolist(), train.micro_batch_size, train.micro_batch_tokens)
    ]
    return [samples[number] for number in max(groups, key=lambda group: int(samples.lengths[group].sum()))]


def _promising(
    lengths: NDArray[np.int32], orders: Iterable[NDArray[np.int64]], train: TrainArgs, ranks: int
) -> list[list[int]]:
    """Return the few global batches whose mean micro-batch and longest sample together promise the most."""
    best: list[tuple[float, list[int]]] = []
    for order in orders:
        starts = np.arange(0, len(order), train.global_batch_size)
        sums, longest = (ufunc.reduceat(lengths[order], starts) for ufunc in (np.add, np.maximum))
        micros = ranks * np.ceil(np.diff(starts, append=len(order)) / (ranks * train.micro_batch_size))
        promise = sums / micros + longest
        for place in np.argsort(-promise)[:PROMISING]:
            best.append((promise[place], order[starts[place] :][: train.global_batch_size].tolist()))
        best = nlargest(PROMISING, best, key=itemgetter(0))
    return [batch for _, batch in best]


def sequential_batches(samples: Samples, size: int) -> Iterator[list[Sample]]:
    """Yield the samples of a split as they stand there, in groups of `size`, the last of which may be smaller."""
    for start in range(0, len(samples), size):
        yield [samples[index] for index in range(start, min(start + size, len(samples)))]


def split_across_ranks(items: Sequence[T], lengths: Sequence[int], ranks: int) -> list[list[T]]:
    """Deal the samples of a global batch to ranks, by how long they are; the smallest batch leaves some without any."""
    groups = balanced_groups(lengths, ranks, most=len(lengths))
    return [[items[index] for index in group] for group in groups]


def micro_batches(samples: Sequence[Sample], size: int, max_tokens: int | None) -> list[MicroBatch]:
    """Split samples into the fewest micro-batches of at most `max_tokens` tokens, or without that of `size` samples.

    They are balanced: none is much longer than another.
    """
    groups = split([len(sample.tokens) for sample in samples], size, max_tokens)
    return [pack([samples[index] for index in group]) for group in groups]


def split(lengths: Sequence[int], size: int, max_tokens: int | None) -> list[list[int]]:
    """Part the samples of these lengths into micro-batches."""
    if max_tokens is None:
        return balanced_groups(lengths, math.ceil(len(lengths) / size), most=size)
    return pack_into_fewest(lengths, max_tokens)


def pack_into_fewest(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Part the samples of these lengths, none above `max_tokens`, into the fewest groups that hold at most that."""
    firsts = _first_fit(lengths, max_tokens)
    for count in range(math.ceil(sum(lengths) / max_tokens), len(firsts) + 1):
        groups = balanced_groups(lengths, count, most=len(lengths))
        if all(sum(lengths[index] for index in group) <= max_tokens for group in groups):
            return groups
    return firsts


def balanced_groups(lengths: Sequence[int], count: int, *, most: int) -> list[list[int]]:
    """Part the samples of these lengths into groups of at most `most`, equally long as nearly as can be had at once.

    The longest goes first, each to the group that is the shortest so far.
    """
    groups: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for index in _longest_first(lengths):
        shortest = min((n for n in range(count) if len(groups[n]) < most), key=filled.__getitem__)
        groups[shortest].append(index)
        filled[shortest] += lengths[index]
    return _in_order(groups)


def _first_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = []
    filled: list[int] = []
    for index in _longest_first(lengths):
        fitting = next((n for n, tokens in enumerate(filled) if tokens + lengths[index] <= max_tokens), len(groups))
        if fitting == len(groups):
            groups.append([])
            filled.append(0)
        groups[fitting].append(index)
        filled[fitting] += lengths[index]
    return _in_order(groups)


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def _in_order(groups: list[list[int]]) -> list[list[int]]:
    """Sort groups, and the samples in each, as the samples stood: the first micro-batch has the first sample."""
    return sorted(sorted(group) for group in groups)


def pack(samples: Sequence[Sample]) -> MicroBatch:
    """Lay samples end to end."""
    tokens = torch.cat([sample.tokens for sample in samples])
    labels = torch.cat([sample.labels for sample in samples])
    return MicroBatch(tokens, labels, tuple(len(sample.tokens) for sample in samples))


def with_dropout_seeds(micros: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Draw a seed for each micro-batch from torch's own generator."""
    seeds = torch.randint(2**62, (len(micros),)).tolist()
    return [replace(micro, seed=seed) for micro, seed in zip(micros, seeds, strict=True)]


def optimize_layout(micro: MicroBatch, backend: Backend, dtype: torch.dtype) -> MicroBatch:
    """Arrange a micro-batch in the layout that is cheapest for a backend's matmuls in `dtype`; its loss is the same."""
    micro = share_prefixes(micro) if backend.shares_prefixes else micro
    return pad(micro, backend.pad_multiple(len(micro.tokens), dtype))


def share_prefixes(micro: MicroBatch) -> MicroBatch:
    """Leave out of each sample what it begins with like another: alike tokens behind alike ones are computed once.

    Samples are sorted, so that those which begin alike are neighbours. A token with a label is always a sample's own.
    """
    parts = zip(*(torch.split(t, list(micro.lengths)) for t in (micro.tokens, micro.labels)), strict=True)
    samples = sorted((Sample(*part) for part in parts), key=lambda sample: sample.tokens.tolist())
    shared = (0, *(_alike(*neighbours) for neighbours in pairwise(samples)))
    own = [Sample(sample.tokens[count:], sample.labels[count:]) for sample, count in zip(samples, shared, strict=True)]
    return replace(pack(own), shared=shared)


def pad(micro: MicroBatch, multiple: int) -> MicroBatch:
    """Put tokens without labels, which no others see, behind the last sample, up to a multiple of so many."""
    more = -len(micro.tokens) % multiple
    *others, last = micro.lengths
    tokens, labels = F.pad(micro.tokens, (0, more)), F.pad(micro.labels, (0, more), value=IGNORE_INDEX)
    return replace(micro, tokens=tokens, labels=labels, lengths=(*others, last + more))


def _alike(before: Sample, sample: Sample) -> int:
    """Return how many tokens a sample begins with as the one before it does, and has no label of its own at."""
    unlabelled = int((sample.labels != IGNORE_INDEX).int().argmax())
    size = min(len(before.tokens), unlabelled)
    differs = before.tokens[:size] != sample.tokens[:size]
    return int(differs.int().argmax()) if differs.any() else size
