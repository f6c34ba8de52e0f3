"""The rows with the highest losses after training: often wrong labels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from litlora.data.batching import DUMMY_MICRO_BATCH, MicroBatch, Sample, Samples, epoch_order, pack
from litlora.evaluation.engine import Engine
from litlora.evaluation.validation import loss_and_tokens
from litlora.models.transformer import evaluating
from litlora.utils.progress import task

LEAST = 64  # tokens that a row costs at least: a short one takes as long
ROUNDS = 16  # of rows, one a rank, between two looks at whether the run is told to stop


@dataclass(frozen=True)
class RowLoss:
    """The mean loss over the supervised tokens of a row's sequence."""

    line: int
    loss: float
    tokens: int
    """The number of its supervised tokens."""


@dataclass(frozen=True)
class RowLosses:
    """The rows with the highest losses among those that were scored."""

    rows: int
    """The number of sequences to choose from."""
    scored: int
    highest: list[RowLoss]


def highest_losses(
    engine: Engine, samples: Samples, count: int, most_tokens: int, seed: int, is_stopped: Callable[[], bool]
) -> RowLosses:
    """Score rows that are chosen at random, of at most `most_tokens` tokens, and return the `count` worst."""
    order = epoch_order(len(samples), seed=seed, epoch=0)
    fits = np.cumsum(np.maximum(samples.lengths[order], LEAST)) <= most_tokens
    chosen = [samples[int(index)] for index in order[: max(1, int(fits.sum()))]]
    scored = list(row_losses(engine, chosen, is_stopped))
    return RowLosses(len(samples), len(scored), sorted(scored, key=lambda row: -row.loss)[:count])


def row_losses(engine: Engine, samples: Sequence[Sample], is_stopped: Callable[[], bool]) -> Iterator[RowLoss]:
    """Yield the loss of each sample, on all ranks, until the run is told to stop."""
    size = ROUNDS * engine.ranks.world_size
    with evaluating(engine.gpt), task("scoring rows", len(samples)) as progress:
        for start in range(0, len(samples), size):
            if is_stopped():
                return
            some = samples[start : start + size]
            for sample, loss in zip(some, _means(engine, some), strict=True):
                yield RowLoss(sample.row, loss, sample.supervised)
            progress.advance(len(some))


def _means(engine: Engine, samples: Sequence[Sample]) -> list[float]:
    """Return the mean losses of samples, each computed by one of the ranks."""
    means = torch.zeros(len(samples), dtype=torch.float64, device=engine.fabric.device)
    results = engine.workers.map(partial(loss_and_tokens, engine), _local(samples, engine))
    for index, (loss, tokens) in zip(_places(samples, engine), results, strict=True):
        if index < len(samples):
            means[index] = loss / tokens
    return [float(mean) for mean in engine.ranks.all_reduce(means)]


def _places(samples: Sequence[Sample], engine: Engine) -> range:
    """Return which samples this rank computes; all ranks have as many, the last of which may not be there."""
    rank, world = engine.ranks.rank, engine.ranks.world_size
    return range(rank, rank + world * -(-len(samples) // world), world)


def _local(samples: Sequence[Sample], engine: Engine) -> Iterator[MicroBatch]:
    for index in _places(samples, engine):
        yield pack([samples[index]]) if index < len(samples) else DUMMY_MICRO_BATCH
