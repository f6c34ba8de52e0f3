"""Metrics as functions of weighted rows, and their 95 % intervals by the bootstrap. Imports no torch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

K = TypeVar("K")
Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Takes weights (samples, rows) and returns the metric of each sample, in which a row counts as often as its weight."""
RESAMPLES = 2000
CHUNK = 100  # resamples whose weights are in memory
LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Estimate:
    """A metric of the rows, and the interval in which it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def estimate(statistics: Mapping[K, Statistic], rows: int, seed: int) -> dict[K, Estimate]:
    """Return each statistic of the rows with its percentile bootstrap interval; all see the same resamples."""
    resampled = [[statistic(weights) for statistic in statistics.values()] for weights in resamples(rows, seed)]
    bounds = np.nanquantile(np.concatenate(resampled, axis=1), LEVELS, axis=1)  # (2, statistics)
    values = [float(statistic(np.ones((1, rows)))[0]) for statistic in statistics.values()]
    return {name: Estimate(*each) for name, *each in zip(statistics, values, *bounds.tolist(), strict=True)}


def resamples(rows: int, seed: int) -> Iterator[Floats]:
    """Yield, chunk by chunk, how often each row is drawn in each resample (samples, rows)."""
    generator = np.random.default_rng(seed)
    for _ in range(RESAMPLES // CHUNK):
        drawn = generator.integers(rows, size=(CHUNK, rows))
        yield np.stack([np.bincount(sample, minlength=rows) for sample in drawn]).astype(np.float64)


def difference(statistic: Statistic, baseline: Statistic) -> Statistic:
    """Return by how much a metric of the same rows exceeds the baseline's."""
    return lambda weights: statistic(weights) - baseline(weights)
