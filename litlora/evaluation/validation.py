"""The validation loss, of all rows and of those of each source."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest

import torch

from litlora.data.batching import DUMMY_MICRO_BATCH, Batching, MicroBatch, Sample, Samples, sequential_batches
from litlora.data.row_sources import ONE_SOURCE, RowSources
from litlora.evaluation.engine import Engine
from litlora.models.transformer import evaluating
from litlora.utils.progress import Task, task


@dataclass(frozen=True)
class ValLoss:
    """Mean losses over supervised tokens."""

    mean: float
    by_source: dict[str, float] = field(default_factory=dict)
    """By the name of the source, if the rows have several."""

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ({parts(self.by_source)})" if self.by_source else "")


def parts(by_source: Mapping[str, float]) -> str:
    """Return the loss of each source as text."""
    return ", ".join(f"{name} {loss:.4f}" for name, loss in by_source.items())


def validate(
    engine: Engine,
    samples: Samples,
    batching: Batching,
    most: int | None = None,
    sources: RowSources = ONE_SOURCE,
) -> ValLoss:
    """Return the mean loss over the supervised tokens of a split, or of its first rows, `most` of them."""
    ranks = engine.ranks
    sums = torch.zeros(len(sources.names), 2, dtype=torch.float64)
    rows = len(samples) if most is None else min(len(samples), most)
    batches = _micro_batches(samples, rows, batching, sources)
    with evaluating(engine.gpt), task("validation", rows) as progress:
        rounds = zip_longest(*[batches] * ranks.world_size, fillvalue=(0, DUMMY_MICRO_BATCH))  # one for each rank
        local = (round_[ranks.rank] for round_ in _counted(rounds, progress))
        for source, loss, tokens in engine.workers.map(partial(_loss_of_source, engine), local):
            sums[source] += torch.tensor([loss, tokens], dtype=torch.float64)
    losses, tokens = ranks.all_reduce(sums.to(engine.fabric.device)).T
    means = zip(sources.names, losses.tolist(), tokens.tolist(), strict=True)
    by_source = {name: loss / count for name, loss, count in means if count}
    return ValLoss(float(losses.sum() / tokens.sum()), by_source if len(sources.names) > 1 else {})


def _micro_batches(
    samples: Samples, most: int, batching: Batching, sources: RowSources
) -> Iterator[tuple[int, MicroBatch]]:
    """Yield micro-batches of the first rows of the split, each of rows of one source, with the index of that source."""
    for group in sequential_batches(samples, batching.global_batch_size, most):
        for source, rows in enumerate(_by_source(group, sources)):
            yield from ((source, micro) for micro in batching.micro_batches(rows))


def _by_source(samples: Sequence[Sample], sources: RowSources) -> list[list[Sample]]:
    split: list[list[Sample]] = [[] for _ in sources.names]
    for sample in samples:
        split[sources.of_line(sample.row)].append(sample)
    return split


def _loss_of_source(engine: Engine, item: tuple[int, MicroBatch]) -> tuple[int, float, int]:
    source, micro = item
    return source, *loss_and_tokens(engine, micro)


def _counted(
    rounds: Iterable[Sequence[tuple[int, MicroBatch]]], progress: Task
) -> Iterator[Sequence[tuple[int, MicroBatch]]]:
    """Yield rounds of micro-batches, and count the rows of each when the next one is asked for."""
    for round_ in rounds:
        yield round_
        progress.advance(sum(len(micro.lengths) for _, micro in round_))


@torch.no_grad()  # in the worker thread: the setting holds for one thread only
def loss_and_tokens(engine: Engine, micro: MicroBatch) -> tuple[float, int]:
    """Return the sum of a micro-batch's losses, and the number of its supervised tokens."""
    return engine.summed_loss(micro).item(), micro.supervised
