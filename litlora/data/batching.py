"""Samples, global batches and packed micro-batches."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush, nlargest
from itertools import pairwise
from operator import itemgetter
from typing import Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from litlora.args.finetune import TrainArgs
from litlora.data.tokens import Tokens
from litlora.nn.backend_interface import Backend
from litlora.nn.loss import IGNORE_INDEX

T = TypeVar("T")
Regimes = Callable[[int], tuple[int, ...]]
"""Tells which lengths of a sequence have the same rotary frequencies: GPTConfig.rope_regimes."""
CANDIDATES = 100  # global batches that are searched for the longest micro-batch


@dataclass(frozen=True)
class Sample:
    """The input of one example: labels[i] is the token after tokens[i], or IGNORE_INDEX."""

    tokens: Tensor
    labels: Tensor
    row: int = 0
    """Its line in the split, counted from 1; 0 if it has none."""

    @property
    def supervised(self) -> int:
        """The number of supervised tokens."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class MicroBatch:
    """A packed sequence of samples: tokens (T,), labels (T,), and the length of each sample."""

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    shared: tuple[int, ...] = ()
    """The length of the prefix that each sample shares with the one before it and does not repeat; () if none does."""
    seed: int = 0
    """Seeds its dropout."""

    @property
    def supervised(self) -> int:
        """The number of supervised tokens."""
        return int((self.labels != IGNORE_INDEX).sum())


DUMMY_MICRO_BATCH = MicroBatch(torch.zeros(1, dtype=torch.long), torch.full((1,), IGNORE_INDEX), (1,))
"""For a rank with fewer micro-batches than another: with sharded weights, all must call the model equally often."""


@dataclass(frozen=True)
class Batching:
    """How samples become global batches and micro-batches."""

    global_batch_size: int
    micro_batch_size: int
    micro_batch_tokens: int | None = None

    @classmethod
    def of(cls, train: TrainArgs) -> Self:
        """Take the settings that matter here."""
        return cls(train.global_batch_size, train.example_limit, train.token_limit)

    def micro_batches(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        """Split a global batch, or a rank's share of it."""
        return micro_batches(samples, self.micro_batch_size, self.micro_batch_tokens)


class Samples:
    """The examples of a split, truncated to `max_seq_length` tokens and read when they are indexed.

    The last token of a text is only ever a label, so an example of that length keeps its EOS.
    """

    def __init__(self, tokens: Tokens, max_seq_length: int) -> None:
        full_lengths = np.diff(tokens.offsets) - 1
        lengths = np.minimum(full_lengths, max_seq_length).astype(np.int32)
        has_label = tokens.first_labels < lengths
        self._tokens = tokens
        self._rows = None if has_label.all() else np.flatnonzero(has_label)
        self.lengths = lengths[has_label]
        """The number of tokens of each sample."""
        self.truncated = int((full_lengths > max_seq_length).sum())
        """The number of examples that are longer."""
        self.dropped = len(full_lengths) - len(self.lengths)
        """The number of those that have no label left."""
        self.unsupervised = int((tokens.about["labels"] == 0).sum())
        """The number of those that have none at their full length either."""
        self.rows = 1 + int((np.diff(tokens.about["line"]) != 0).sum())
        """The number of rows of the split, each of which may be several examples."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        row = index if self._rows is None else int(self._rows[index])
        stored = torch.from_numpy(self._tokens.example(row, int(self.lengths[index]))).long()
        tokens = torch.where(stored < 0, ~stored, stored)
        return Sample(
            tokens[:-1], torch.where(stored < 0, IGNORE_INDEX, stored)[1:], int(self._tokens.about["line"][row])
        )


def epoch_order(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the indices of samples in the order of an epoch, which depends on seed and epoch only."""
    order: NDArray[np.int64] = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).numpy()
    return order


def longest_micro_batch(
    samples: Samples, orders: Iterable[NDArray[np.int64]], train: TrainArgs, ranks: int, workers: int = 1
) -> list[Sample]:
    """Return the samples of the micro-batch that needs most memory among all global batches of these orders.

    That is the one with the most tokens, counting those of as many as are concurrent.
    """

    def tokens(group: list[int]) -> int:
        lengths: list[int] = samples.lengths[group].tolist()
        return sum(lengths) * (1 if is_alone(lengths, train.token_limit) else workers)

    groups = [
        [share[index] for index in group]
        for batch in _candidates(samples.lengths, orders, train, ranks)
        for share in filter(None, split_across_ranks(batch, samples.lengths[batch].tolist(), ranks))
        for group in group_samples(samples.lengths[share].tolist(), train.example_limit, train.token_limit)
    ]
    return [samples[index] for index in max(groups, key=tokens)]


def is_alone(lengths: Sequence[int], max_tokens: int | None) -> bool:
    """Tell whether a micro-batch of samples of these lengths exceeds the limit, so that none is concurrent to it."""
    return max_tokens is not None and sum(lengths) > max_tokens


def _candidates(
    lengths: NDArray[np.int32], orders: Iterable[NDArray[np.int64]], train: TrainArgs, ranks: int
) -> list[list[int]]:
    """Return the few global batches with the largest sum of mean micro-batch and longest sample."""
    best: list[tuple[float, list[int]]] = []
    for order in orders:
        starts = np.arange(0, len(order), train.global_batch_size)
        sums, longest = (ufunc.reduceat(lengths[order], starts) for ufunc in (np.add, np.maximum))
        micros = ranks * np.ceil(np.diff(starts, append=len(order)) / (ranks * train.example_limit))
        scores = sums / micros + longest
        for index in np.argsort(-scores)[:CANDIDATES]:
            best.append((scores[index], order[starts[index] :][: train.global_batch_size].tolist()))
        best = nlargest(CANDIDATES, best, key=itemgetter(0))
    return [batch for _, batch in best]


def sequential_batches(samples: Samples, size: int, most: int | None = None) -> Iterator[list[Sample]]:
    """Yield the samples of a split, or the first `most` of them, in order, in batches of `size`."""
    count = len(samples) if most is None else most
    for start in range(0, count, size):
        yield [samples[index] for index in range(start, min(start + size, count))]


def split_across_ranks(items: Sequence[T], lengths: Sequence[int], ranks: int) -> list[list[T]]:
    """Split a global batch into shares of balanced length, one per rank; a small batch leaves some empty."""
    groups = balanced_groups(lengths, ranks, most=len(lengths))
    return [[items[index] for index in group] for group in groups]


def micro_batches(samples: Sequence[Sample], size: int, max_tokens: int | None) -> list[MicroBatch]:
    """Split samples into micro-batches of balanced length.

    Their number is the least with at most `max_tokens` tokens each, or without `max_tokens` at most `size` samples.
    """
    groups = group_samples([len(sample.tokens) for sample in samples], size, max_tokens)
    return [pack([samples[index] for index in group]) for group in groups]


def group_samples(lengths: Sequence[int], size: int, max_tokens: int | None) -> list[list[int]]:
    """Return the indices of the samples of each micro-batch."""
    if max_tokens is None:
        return balanced_groups(lengths, math.ceil(len(lengths) / size), most=size)
    return pack_into_fewest(lengths, max_tokens)


def pack_into_fewest(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group samples into the fewest groups of at most `max_tokens` tokens; a longer sample is a group by itself."""
    longer = [[index] for index, length in enumerate(lengths) if length > max_tokens]
    others = [index for index, length in enumerate(lengths) if length <= max_tokens]
    groups = _fewest([lengths[index] for index in others], max_tokens)
    return _in_order([*longer, *([others[index] for index in group] for group in groups)])


def _fewest(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    firsts = _first_fit(lengths, max_tokens)
    for count in range(math.ceil(sum(lengths) / max_tokens), len(firsts) + 1):
        groups = balanced_groups(lengths, count, most=len(lengths))
        if all(sum(lengths[index] for index in group) <= max_tokens for group in groups):
            return groups
    return firsts


def balanced_groups(lengths: Sequence[int], count: int, *, most: int) -> list[list[int]]:
    """Group samples into `count` groups of at most `most` samples and of nearly equal length.

    Greedy: the longest sample first, each into the group that is the shortest so far.
    """
    groups: list[list[int]] = [[] for _ in range(count)]
    shortest = [(0, n) for n in range(count)]  # a heap of the groups' lengths
    for index in _longest_first(lengths):
        length, n = heappop(shortest)
        groups[n].append(index)
        if len(groups[n]) < most:
            heappush(shortest, (length + lengths[index], n))
    return _in_order(groups)


def _first_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = []
    totals: list[int] = []
    for index in _longest_first(lengths):
        fitting = next((n for n, tokens in enumerate(totals) if tokens + lengths[index] <= max_tokens), len(groups))
        if fitting == len(groups):
            groups.append([])
            totals.append(0)
        groups[fitting].append(index)
        totals[fitting] += lengths[index]
    return _in_order(groups)


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def _in_order(groups: list[list[int]]) -> list[list[int]]:
    """Restore the order of the samples within the groups and of the groups: the first has the first sample."""
    return sorted(sorted(group) for group in groups)


def pack(samples: Sequence[Sample]) -> MicroBatch:
    """Concatenate samples."""
    tokens = torch.cat([sample.tokens for sample in samples])
    labels = torch.cat([sample.labels for sample in samples])
    return MicroBatch(tokens, labels, tuple(len(sample.tokens) for sample in samples))


def with_dropout_seeds(micros: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Draw a seed for each micro-batch from torch's default generator."""
    seeds = torch.randint(2**62, (len(micros),)).tolist()
    return [replace(micro, seed=seed) for micro, seed in zip(micros, seeds, strict=True)]


def optimize_layout(micro: MicroBatch, backend: Backend, dtype: torch.dtype, regimes: Regimes) -> MicroBatch:
    """Arrange a micro-batch in the layout that is cheapest for a backend's matmuls in `dtype`; its loss is the same."""
    micro = share_prefixes(micro, regimes) if backend.shares_prefixes else micro
    return pad(micro, backend.pad_multiple(len(micro.tokens), dtype))


def share_prefixes(micro: MicroBatch, regimes: Regimes) -> MicroBatch:
    """Remove from each sample the prefix that it shares with the one before it, which is then computed once.

    Samples are sorted, so that those with a common prefix are neighbours. A token with a label is never shared, and
    no prefix by samples whose lengths have different rotary frequencies.
    """
    pieces = zip(*(torch.split(t, list(micro.lengths)) for t in (micro.tokens, micro.labels)), strict=True)
    by_regime = [(regimes(len(piece[0])), Sample(*piece)) for piece in pieces]
    by_regime.sort(key=lambda item: (item[0], item[1].tokens.tolist()))
    pairs = pairwise(by_regime)
    shared = (0, *(_shared_prefix(a, b) if before == regime else 0 for (before, a), (regime, b) in pairs))
    samples = [sample for _, sample in by_regime]
    rests = [Sample(s.tokens[count:], s.labels[count:]) for s, count in zip(samples, shared, strict=True)]
    return replace(pack(rests), shared=shared)


def pad(micro: MicroBatch, multiple: int) -> MicroBatch:
    """Pad the packed sequence to a multiple, by a further sequence of tokens without labels."""
    padding = -len(micro.tokens) % multiple
    tokens, labels = F.pad(micro.tokens, (0, padding)), F.pad(micro.labels, (0, padding), value=IGNORE_INDEX)
    return replace(micro, tokens=tokens, labels=labels, lengths=(*micro.lengths, padding)) if padding else micro


def _shared_prefix(before: Sample, sample: Sample) -> int:
    """Return the length of the prefix without labels that a sample has in common with the one before it."""
    unlabelled = int((sample.labels != IGNORE_INDEX).int().argmax())
    size = min(len(before.tokens), unlabelled)
    differs = before.tokens[:size] != sample.tokens[:size]
    return int(differs.int().argmax()) if differs.any() else size
