"""The study: which trials there are, which are done, and who takes the next. Optuna's journal in out_dir records it.

A worker holds the lock of the trial that it trains. The kernel releases it however the worker ends: a trial that is
recorded as running and not locked has lost its worker, and the next worker finishes it under the same number.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from litlora.errors import LitLoraError
from litlora.sweep.plan import Plan
from litlora.sweep.space import SEED, Point, Range, Value
from litlora.utils.files import check_writable
from litlora.utils.locks import holding, take

JOURNAL, NAME = "study.journal", "litlora"
IDENTITY = "identity"
"""The attribute of a study that tells it from another one."""
COMBINATION, TRIAL_SEED, ERROR, FIGURES = "combination", "seed", "error", "figures"
"""Attributes of a trial."""
WARM_UP = 4
"""Trials that the pruner lets end before it stops one."""


class JournalLock(JournalFileOpenLock):
    """A lock that the kernel releases when its process is killed; Optuna's own would block the others for a while."""

    def __init__(self, path: Path) -> None:
        self._path, self._held = path, ExitStack()

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._held.enter_context(holding(self._path))
        return True

    def release(self) -> None:
        """Release the lock."""
        self._held.close()


@dataclass(frozen=True)
class Assignment:
    """A trial that this worker trains."""

    trial: Trial
    point: Point
    seed: int
    seen: frozenset[int]
    """Steps whose validation loss is recorded, by a worker that did not finish."""

    @property
    def number(self) -> int:
        return self.trial.number

    def record(self, step: int, loss: float) -> bool:
        """Record the validation loss of a step, and tell whether the pruner would stop the trial."""
        if step not in self.seen:
            self.trial.report(loss, step)
        return self.trial.should_prune()


class Study:
    """The study of a plan, shared by all workers."""

    def __init__(self, plan: Plan) -> None:
        """Open the study in out_dir, or begin it; LitLoraError if it belongs to another search space."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._plan, self._folder = plan, plan.args.out_dir
        check_writable(self._folder, "--out_dir")
        self._points, self._seeds = plan.points(), plan.args.seeds
        with self._alone(), self._naming_journal():
            self._study = self._open()
            self._enqueue()

    def _open(self) -> optuna.Study:
        path = self._folder / JOURNAL
        if not path.exists() and any(self._folder.glob("trial-*")):
            raise LitLoraError(f"--out_dir ({self._folder}) holds trials without their study: choose another folder")
        storage = JournalStorage(JournalFileBackend(str(path), JournalLock(self._folder / ".journal.lock")))
        samplers = {"tpe": TPESampler(seed=None, constant_liar=True)}
        study = optuna.create_study(
            storage=storage,
            study_name=NAME,
            load_if_exists=True,
            sampler=samplers.get(self._plan.args.method, RandomSampler(SEED)),
            pruner=_pruner(self._plan.args.pruner),
        )
        self._check_identity(study)
        return study

    def _check_identity(self, study: optuna.Study) -> None:
        now, was = self._plan.identity(), study.user_attrs.get(IDENTITY)
        if was is None:
            study.set_user_attr(IDENTITY, now)
        elif changed := [name for name in now if now[name] != was.get(name)]:
            verb = "differs" if len(changed) == 1 else "differ"
            fault = f"holds a study of another search space ({', '.join(changed)} {verb})"
            raise LitLoraError(f"--out_dir ({self._folder}) {fault}: choose another folder")

    @contextmanager
    def _naming_journal(self) -> Iterator[None]:
        """Refuse a journal that Optuna cannot read."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            path = self._folder / JOURNAL
            raise LitLoraError(f"{path} is corrupt ({error}): choose another --out_dir") from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have no other worker choose a trial meanwhile."""
        with holding(self._folder / ".study.lock"):
            yield

    @property
    def total(self) -> int:
        """The number of trials when all is done."""
        return self.combinations * len(self._seeds)

    @property
    def combinations(self) -> int:
        """The number of combinations, those of an earlier call with more --trials included."""
        count = self._plan.args.trials if self._points is None else len(self._points)
        return max([count, *(int(trial.user_attrs[COMBINATION]) + 1 for trial in self.trials())])

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the trials in these states, by default all, by number."""
        return self._study.get_trials(deepcopy=False, states=states or None)

    def is_done(self) -> bool:
        """Tell whether every trial has ended, well or not."""
        return len([trial for trial in self.trials() if trial.state.is_finished()]) == self.total

    def _enqueue(self) -> None:
        """Add trials that are not in the study: all whose settings are known, else one for the sampler to choose."""
        for combination, point in self._known_points().items():
            there = {t.user_attrs[TRIAL_SEED] for t in self.trials() if t.user_attrs[COMBINATION] == combination}
            for seed in self._seeds:
                if seed not in there:
                    self._add(point, combination, seed)
        begun = {trial.user_attrs[COMBINATION] for trial in self.trials()}
        if self._points is None and not self.trials(TrialState.WAITING) and len(begun) < self.combinations:
            self._add({}, len(begun), self._seeds[0])

    def _known_points(self) -> Mapping[int, Point]:
        if self._points is not None:
            return dict(enumerate(self._points))
        chosen = (trial for trial in self.trials() if len(trial.params) == len(self._plan.space.dimensions))
        return {trial.user_attrs[COMBINATION]: dict(trial.params) for trial in chosen}

    def _add(self, point: Point, combination: int, seed: int) -> None:
        self._study.enqueue_trial(point, user_attrs={COMBINATION: combination, TRIAL_SEED: seed})

    @contextmanager
    def next(self) -> Iterator[Assignment | None]:
        """Yield the next trial, locked for the time of the block; None while the others train all that is left."""
        with self._alone():
            trial, descriptor = self._abandoned() or self._waiting()
            assignment = None if trial is None else self._assigned(trial)
            self._enqueue()
        try:
            yield assignment
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _abandoned(self) -> tuple[Trial, int] | None:
        """Return a trial whose worker has ended without finishing it."""
        for frozen in self.trials(TrialState.RUNNING):
            if (descriptor := take(self._lock_of(frozen.number))) is not None:
                if frozen.number in {trial.number for trial in self.trials(TrialState.RUNNING)}:
                    return Trial(self._study, frozen._trial_id), descriptor
                os.close(descriptor)  # finished since then
        return None

    def _waiting(self) -> tuple[Trial | None, int | None]:
        """Return a trial that nobody has begun."""
        self._enqueue()
        if not self.trials(TrialState.WAITING):
            return None, None
        trial = self._study.ask()
        return trial, take(self._lock_of(trial.number))

    def _lock_of(self, number: int) -> Path:
        return self._folder / f".trial-{number + 1:04d}.lock"

    def _assigned(self, trial: Trial) -> Assignment:
        """Have the sampler choose what is not fixed; a trial of an earlier worker keeps what it had."""
        point = {each.name: _suggested(trial, each) for each in self._plan.space.dimensions}
        frozen = self.trials()[trial.number]
        return Assignment(trial, point, trial.user_attrs[TRIAL_SEED], frozenset(frozen.intermediate_values))

    def complete(self, assignment: Assignment, loss: float, figures: Mapping[str, Any]) -> None:
        """Record the end of a trial."""
        assignment.trial.set_user_attr(FIGURES, dict(figures))
        self._tell(assignment, loss, TrialState.COMPLETE)

    def prune(self, assignment: Assignment) -> None:
        """Record that the pruner has stopped a trial."""
        self._tell(assignment, None, TrialState.PRUNED)

    def fail(self, assignment: Assignment, error: str) -> None:
        """Record a trial that has failed, and why."""
        assignment.trial.set_user_attr(ERROR, error)
        self._tell(assignment, None, TrialState.FAIL)

    def _tell(self, assignment: Assignment, loss: float | None, state: TrialState) -> None:
        self._study.tell(assignment.trial, loss, state)
        with suppress(OSError):
            self._lock_of(assignment.number).unlink()


def _suggested(trial: Trial, dimension: Any) -> Value:
    if not isinstance(dimension, Range):
        return str(trial.suggest_categorical(dimension.name, dimension.values))
    if dimension.is_whole:
        return trial.suggest_int(dimension.name, int(dimension.low), int(dimension.high), log=dimension.log)
    return trial.suggest_float(dimension.name, dimension.low, dimension.high, log=dimension.log)


def _pruner(name: str | None) -> BasePruner:
    match name:
        case "median":
            return MedianPruner(n_startup_trials=WARM_UP)
        case "halving":
            return SuccessiveHalvingPruner()
        case _:
            return NopPruner()


def combinations(trials: Sequence[FrozenTrial]) -> dict[int, list[FrozenTrial]]:
    """Return the trials of each combination."""
    groups: dict[int, list[FrozenTrial]] = {}
    for trial in trials:
        groups.setdefault(trial.user_attrs[COMBINATION], []).append(trial)
    return groups
