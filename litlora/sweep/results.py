"""The results of a sweep: a row for each combination, with its validation loss over the seeds. Imports no torch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from litlora.sweep.plan import Plan
from litlora.sweep.study import ERROR, FIGURES, TRIAL_SEED, Study, combinations

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""The 97.5 % quantile of Student's t, by degrees of freedom from 1; beyond, the last is a little too wide."""
STATES = {TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
SHOWN = {"seconds": "seconds", "peak_memory_gb": "GB", "trainable_parameters": "parameters"}
"""Figures of the table, by what it calls them."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, and half the width of its 95 % interval; None with one seed."""

    value: float
    margin: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Return the mean of values, with the interval of Student's t."""
        if len(values) == 1:
            return cls(values[0], None)
        quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
        return cls(fmean(values), quantile * stdev(values) / math.sqrt(len(values)))

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) + ("" if self.margin is None else f" ± {abs(self.margin):.4f}")


@dataclass(frozen=True)
class Row:
    """A combination, and its trials."""

    combination: int
    names: Mapping[str, str]
    """The value of each dimension."""
    trials: list[FrozenTrial]

    @cached_property
    def losses(self) -> dict[int, float]:
        """The validation losses by seed, of the trials that were completed."""
        done = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        return {trial.user_attrs[TRIAL_SEED]: float(trial.value or 0) for trial in done}

    @cached_property
    def loss(self) -> Mean | None:
        """The mean validation loss; None if no trial was completed."""
        return Mean.of(list(self.losses.values())) if self.losses else None

    @property
    def spread(self) -> float | None:
        """The standard deviation over the seeds."""
        return stdev(self.losses.values()) if len(self.losses) > 1 else None

    def above(self, other: "Row") -> Mean | None:
        """Return by how much the loss exceeds another row's, over the seeds of both."""
        shared = self.losses.keys() & other.losses.keys()
        return Mean.of([self.losses[seed] - other.losses[seed] for seed in sorted(shared)]) if shared else None

    def mean(self, figure: str) -> float | None:
        """Return the mean of a figure."""
        found = [trial.user_attrs.get(FIGURES, {}).get(figure) for trial in self.trials]
        numbers = [number for number in found if number is not None]
        return fmean(numbers) if numbers else None

    @property
    def ended_early(self) -> str:
        """How many of the trials were not completed."""
        counts = {name: sum(trial.state == state for trial in self.trials) for state, name in STATES.items()}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def rows(plan: Plan, study: Study) -> list[Row]:
    """Return the combinations, the best first and those without a completed trial last."""
    found = [
        Row(combination, {name: _shown(value) for name, value in plan.space.shown(trials[0].params).items()}, trials)
        for combination, trials in combinations(study.trials()).items()
    ]
    return sorted(found, key=lambda row: (row.loss is None, row.loss.value if row.loss else row.combination))


def chart(found: Sequence[Row]) -> list[tuple[str, list[float]]]:
    """Return the losses of each row, named by the values in which the rows differ."""
    names = [name for name in found[0].names if len({row.names.get(name) for row in found}) > 1]
    return [(", ".join(row.names.get(name, "") for name in names), list(row.losses.values())) for row in found]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(plan: Plan, found: Sequence[Row]) -> list[list[str]]:
    """Return the table: its head, and a line for each row."""
    names = [dimension.name for dimension in plan.space.dimensions]
    several = len(plan.args.seeds) > 1
    spread = ["spread", "seeds"] if several else []
    head = [*names, "val_loss", *spread, "above best", *SHOWN.values(), *plan.metrics, "ended early"]
    lines = [[row.names.get(name, "") for name in names] + _figures(plan, row, found[0], several) for row in found]
    return _without_empty([head, *lines])


def _figures(plan: Plan, row: Row, best: Row, several: bool) -> list[str]:
    above = None if row is best else row.above(best)
    spread = ["" if row.spread is None else f"{row.spread:.4f}", str(len(row.losses))] if several else []
    means = [_number(name, row.mean(name)) for name in (*SHOWN, *plan.metrics)]
    return [
        f"{row.loss.value:.4f}" if row.loss else "",
        *spread,
        f"{above:+.4f}" if above else "",
        *means,
        row.ended_early,
    ]


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if name in ("trainable_parameters",) else f"{value:.4g}"


def _without_empty(lines: list[list[str]]) -> list[list[str]]:
    """Leave out columns without a value."""
    kept = [n for n in range(len(lines[0])) if any(line[n] for line in lines[1:])]
    return [[line[n] for n in kept] for line in lines]


def aligned(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def failures(plan: Plan, study: Study) -> list[str]:
    """Return a sentence for each trial that has failed."""
    failed = study.trials(TrialState.FAIL)
    return [f"{plan.folder(trial.number).name} failed: {trial.user_attrs.get(ERROR, '')}" for trial in failed]


def to_json(plan: Plan, study: Study) -> dict[str, Any]:
    """Return all trials with their settings, losses and figures."""
    return {"sweep": plan.identity(), "trials": [_trial(plan, trial) for trial in study.trials()]}


def _trial(plan: Plan, trial: FrozenTrial) -> dict[str, Any]:
    return {
        "folder": plan.folder(trial.number).name,
        "state": trial.state.name.lower(),
        "settings": plan.space.settings(trial.params) if trial.params else {},
        "seed": trial.user_attrs[TRIAL_SEED],
        "val_loss": trial.value,
        "val_losses": trial.intermediate_values,
        "figures": trial.user_attrs.get(FIGURES, {}),
        "error": trial.user_attrs.get(ERROR),
    }  # fmt: skip
