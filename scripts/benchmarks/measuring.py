"""One case: the programs in turn, repetition by repetition, and whether they did the same work."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.cases import LITLORA, PRODUCTS, Case, Program
from benchmarks.environments import Environments, ProgramError, run_job
from benchmarks.jobs import PROMPT_TOKENS, Device, Job, Precision, Products, Result, Task

# Relative. What bfloat16 rounds, each program in places of its own, evens out over the tokens of a step.
FIRST_LOSS = {"32-true": 1e-4, "bf16-true": 2e-2}
LATER_LOSSES = 2e-2  # every program draws an adapter and its dropout of its own


class DisagreementError(Exception):
    """Two programs that should have done the same did not."""


@dataclass
class Measurement:
    """What came of a case."""

    title: str
    task: Task
    precision: Precision
    rows: int
    results: dict[str, list[Result]] = field(default_factory=dict)
    products: list[Products] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Why a program is not among the results."""
    device: Device = "cpu"


def measure(case: Case, job: Job, environments: Environments, repetitions: int) -> Measurement:
    """Run the programs of a case in turn, forth and back, and stop when they disagree.

    A program that fails is left out from there on: what it did until then counts for nothing.
    """
    measurement = Measurement(case.title, case.task, case.precision, job.rows, device=job.device)
    pythons, missing = environments.pythons, environments.missing
    measurement.missing = {p.name: missing[p.environment] for p in case.programs if p.environment in missing}
    for repetition in range(repetitions):
        if case.task == "train":
            found = run_job(replace(job, task="products"), pythons["litlora"], PRODUCTS.environment)
            measurement.products.append(Products(**found))
        for program in case.programs[:: -1 if repetition % 2 else 1]:
            if program.name not in measurement.missing:
                variant = replace(job, compiled=program.compiled)
                take(measurement, program, variant, pythons[program.environment])
    return measurement


def take(measurement: Measurement, program: Program, job: Job, python: Path) -> None:
    """Have one program do the job once more."""
    try:
        result = Result(**run_job(job, python, program.environment))
    except ProgramError as error:
        if program == LITLORA:
            raise
        measurement.results.pop(program.name, None)
        measurement.missing[program.name] = str(error)
        sys.stderr.write(f"  {program.name} is left out: {error}\n")
        return
    sys.stderr.write(f"  {program.name}: {result.seconds:.2f} s\n")
    for name, results in measurement.results.items():
        compare(name, results[0], program.name, result, measurement.precision)
    measurement.results.setdefault(program.name, []).append(result)


def compare(name: str, result: Result, other_name: str, other: Result, precision: Precision) -> None:
    """Refuse results that are not of the same work."""

    def agree(what: str, ours: object, theirs: object, same: bool) -> None:
        if not same:
            raise DisagreementError(f"{name} and {other_name} disagree on {what}: {ours} and {theirs}")

    counts = (result.tokens, result.supervised), (other.tokens, other.supervised)
    agree("the number of tokens, and of supervised ones", *counts, counts[0] == counts[1])
    agree("the losses of the steps", result.losses, other.losses, close(result.losses, other.losses, precision))
    prompts = result.ids[:PROMPT_TOKENS], other.ids[:PROMPT_TOKENS]
    agree("the tokens of the prompt", *prompts, prompts[0] == prompts[1])
    same = precision != "32-true" or result.ids == other.ids
    agree("the tokens that are generated", result.ids, other.ids, same)


def close(losses: Sequence[float], others: Sequence[float], precision: Precision) -> bool:
    """Tell whether the losses of all steps agree; an untrained adapter adds nothing, so the first is the base's own."""
    tolerances = [FIRST_LOSS[precision]] + [LATER_LOSSES] * (len(losses) - 1)
    pairs = zip(losses, others, tolerances, strict=False)
    return len(losses) == len(others) and all(abs(a - b) <= tolerance * abs(a) for a, b, tolerance in pairs)


def leading(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return how many of the generated tokens are the same until the first that is not."""
    pairs = list(zip(ids, others, strict=True))[PROMPT_TOKENS:]
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
