"""The workers of a sweep: each trains one trial after another, until none is left."""

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from litlora.args.common import plain
from litlora.distributed.launcher import THREADS, Child, forwarding_signals, launch
from litlora.errors import EndedElsewhereError, LitLoraError, StoppedError
from litlora.lora.adapter_folder import FINAL
from litlora.report.files import read_metrics
from litlora.sweep.plan import EVALUATION, Plan
from litlora.sweep.study import Assignment, Study
from litlora.utils.console import log
from litlora.utils.files import read_json, write_atomically
from litlora.utils.locks import LOCK, holding
from litlora.utils.processes import usable_cores
from litlora.utils.signals import LAUNCHED, SIGNALLED, SIGNALS

SETTINGS = "sweep.yaml"
OUTPUT = "output.txt"
"""What a trial prints, in its folder."""
POLL = 0.5  # seconds between two looks at a running trial, or at the study while others train all that is left
REPEAT = "run the same command again to continue"
FIGURES = ("seconds", "peak_memory_gb", "trainable_parameters", "start_val_loss", "steps")
"""Figures of a run's report that the study records."""
Runner = Callable[[Sequence[str], int, Path, Callable[[], bool]], object]
"""Runs a command of litlora, on this many devices, with its output in a file, until it ends or is to end early."""


def run_in_process_of_its_own(words: Sequence[str], devices: int, output: Path, ends_early: Callable[[], bool]) -> None:
    """Run a command as from a shell; its error is raised here, and it ends when this process does."""
    with output.open("ab") as file:
        launch([sys.executable, "-m", "litlora", *words], devices, file.fileno(), ends_early)


@dataclass
class Watcher:
    """Passes validation losses from a running trial's metrics.csv to the study, and tells whether to stop it."""

    path: Path
    assignment: Assignment
    is_pruned: bool = False
    _seen: set[float] = field(default_factory=set)
    _next: float = 0.0

    def __call__(self) -> bool:
        """Look at the file now and then."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + POLL
        self.is_pruned = self.read()
        return self.is_pruned

    def read(self) -> bool:
        """Record losses that are new; the one before the first step is the base's, and equal in all trials."""
        rows = read_metrics(self.path.parent)
        losses = {row["step"]: row["val_loss"] for row in rows if row.get("step") and "val_loss" in row}
        new = [(step, loss) for step, loss in losses.items() if step not in self._seen]
        self._seen |= losses.keys()
        stops = [self.assignment.record(int(step), loss) for step, loss in new]
        return any(stops)


def work(plan: Plan, run: Runner = run_in_process_of_its_own) -> Study:
    """Train what is left of a study, together with all other workers, and return it once every trial has ended."""
    study = Study(plan)
    while not study.is_done():
        with study.next() as assignment:
            if assignment is not None:
                train(plan, study, assignment, run)
        if assignment is None:
            time.sleep(POLL)
    return study


def train(plan: Plan, study: Study, assignment: Assignment, run: Runner) -> None:
    """Train a trial and record how it ends; StoppedError if this worker is told to stop."""
    folder, name = plan.folder(assignment.number), plan.folder(assignment.number).name
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / LOCK).exists():
        with holding(folder / LOCK):  # of the process of a killed worker, which ends at once
            pass
    settings = plan.space.settings(assignment.point)
    log(f"{name} of {study.total}: {', '.join(f'{key} {value}' for key, value in settings.items())}"
        f", seed {assignment.seed}")  # fmt: skip
    watcher = Watcher(folder / "metrics.csv", assignment)
    try:
        run(
            plan.training(assignment.number, assignment.point, assignment.seed),
            plan.first.devices,
            folder / OUTPUT,
            watcher,
        )
        if plan.args.evaluate is not None:
            run(plan.evaluation(assignment.number), 1, folder / OUTPUT, lambda: False)
        watcher.read()
        loss, figures = result(plan, folder)
    except LitLoraError as error:
        if watcher.is_pruned:
            log(f"{name}: stopped by the pruner")
            study.prune(assignment)
            return
        if error.exit_code in {SIGNALLED + number for number in SIGNALS}:
            raise StoppedError(f"stopped in {name}: {REPEAT}", error.exit_code) from error
        fault = (
            f"it ended with a traceback, in {folder / OUTPUT}" if isinstance(error, EndedElsewhereError) else str(error)
        )
        log(f"{name} failed: {fault}")
        study.fail(assignment, fault)
        return
    log(f"{name}: validation loss {loss:.4f}")
    study.complete(assignment, loss, figures)


def result(plan: Plan, folder: Path) -> tuple[float, dict[str, Any]]:
    """Return the validation loss of a finished trial, and its figures."""
    report = read_json(folder / FINAL / "report.json")
    loss = report.get("val_loss")
    if loss is None or not math.isfinite(loss):
        raise LitLoraError(f"its validation loss is {loss}: leave --eval.final_validation true, or lower the rate")
    figures = {name: report.get(name) for name in FIGURES}
    if plan.args.evaluate is not None:
        measured = read_json(folder / EVALUATION)["metrics"]
        figures |= {name: measured[name]["value"] for name in plan.metrics}
    return float(loss), figures


def work_in_processes(plan: Plan) -> Study:
    """Start workers, each the same command with one worker, and return the study once all have ended.

    A worker that is killed leaves its trial to the others.
    """
    study, folder = Study(plan), plan.args.out_dir
    alone = plain(replace(plan.args, workers=1))
    write_atomically({folder / SETTINGS: yaml.safe_dump(alone, sort_keys=False).encode()})
    command = [sys.executable, "-m", "litlora", "sweep", "--config", str(folder / SETTINGS)]
    threads = {THREADS: os.environ.get(THREADS, str(max(1, usable_cores() // plan.args.workers)))}
    alive, held = os.pipe()  # `held` closes with this process, however it ends
    with ExitStack() as stack, Path(os.devnull).open("wb") as nowhere:
        stack.callback(os.close, held)
        stack.callback(os.close, alive)
        children = [Child(command, threads | {LAUNCHED: "1"}, alive, stdout=nowhere.fileno())
                    for _ in range(plan.args.workers)]  # fmt: skip
        with forwarding_signals([child.process for child in children]) as forwarded:
            for child in children:
                child.process.wait()
        messages = [child.message() for child in children]
        for child in children:
            os.close(child.messages)
    if study.is_done():
        return study
    if forwarded:
        raise StoppedError(f"stopped: {REPEAT}", SIGNALLED + forwarded[-1])
    raise next(filter(None, messages), LitLoraError(f"all workers have ended before the last trial: {REPEAT}"))
