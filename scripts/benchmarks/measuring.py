"""One case: alternating runs of the programs, and the check that they computed the same."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.cases import LITLORA, PRODUCTS, Case, Program
from benchmarks.environments import Environments, ProgramError, run_job
from benchmarks.jobs import PROMPT_TOKENS, Device, Job, Precision, Products, Result, Task

# Relative tolerances. Programs round at different points in bfloat16, which averages out over the tokens of a step.
FIRST_LOSS = {"32-true": 1e-4, "bf16-true": 2e-2}
LATER_LOSSES = 2e-2  # every program draws its own initial adapter and dropout


class DisagreementError(Exception):
    """Two programs did not compute the same."""


@dataclass
class Measurement:
    """The results of a case."""

    title: str
    task: Task
    precision: Precision
    rows: int
    results: dict[str, list[Result]] = field(default_factory=dict)
    products: list[Products] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """The reasons why programs have no results."""
    device: Device = "cpu"


def measure(case: Case, job: Job, environments: Environments, repetitions: int) -> Measurement:
    """Run the programs of a case alternately, reversing the order each time; fail if they disagree.

    A program that fails is removed together with its earlier results.
    """
    measurement = Measurement(case.title, case.task, case.precision, job.rows, device=job.device)
    pythons, missing = environments.pythons, environments.missing
    measurement.missing = {p.name: missing[p.environment] for p in case.programs if p.environment in missing}
    for repetition in range(repetitions):
        if case.task == "train":
            values = run_job(replace(job, task="products"), pythons["litlora"], PRODUCTS.environment)
            measurement.products.append(Products(**values))
        for program in case.programs[:: -1 if repetition % 2 else 1]:
            if program.name not in measurement.missing:
                variant = replace(job, compiled=program.compiled)
                run_once(measurement, program, variant, pythons[program.environment])
    return measurement


def run_once(measurement: Measurement, program: Program, job: Job, python: Path) -> None:
    """Run the job once with one program."""
    try:
        result = Result(**run_job(job, python, program.environment))
    except ProgramError as error:
        if program == LITLORA:
            raise
        measurement.results.pop(program.name, None)
        measurement.missing[program.name] = str(error)
        sys.stderr.write(f"  {program.name} is removed: {error}\n")
        return
    sys.stderr.write(f"  {program.name}: {result.seconds:.2f} s\n")
    for name, results in measurement.results.items():
        compare(name, results[0], program.name, result, measurement.precision)
    measurement.results.setdefault(program.name, []).append(result)


def compare(name: str, result: Result, other_name: str, other: Result, precision: Precision) -> None:
    """Refuse results that differ."""

    def require(what: str, first: object, second: object, same: bool) -> None:
        if not same:
            raise DisagreementError(f"{name} and {other_name} disagree on {what}: {first} and {second}")

    counts = (result.tokens, result.supervised), (other.tokens, other.supervised)
    require("the number of tokens, and of supervised ones", *counts, counts[0] == counts[1])
    require("the losses of the steps", result.losses, other.losses, close(result.losses, other.losses, precision))
    prompts = result.ids[:PROMPT_TOKENS], other.ids[:PROMPT_TOKENS]
    require("the tokens of the prompt", *prompts, prompts[0] == prompts[1])
    same = precision != "32-true" or result.ids == other.ids
    require("the tokens that are generated", result.ids, other.ids, same)


def close(losses: Sequence[float], others: Sequence[float], precision: Precision) -> bool:
    """Return whether the losses of all steps agree; the first is the base's, since an untrained adapter adds zero."""
    tolerances = [FIRST_LOSS[precision]] + [LATER_LOSSES] * (len(losses) - 1)
    pairs = zip(losses, others, tolerances, strict=False)
    return len(losses) == len(others) and all(abs(a - b) <= tolerance * abs(a) for a, b, tolerance in pairs)


def leading(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return the number of identical generated tokens before the first difference."""
    pairs = list(zip(ids, others, strict=True))[PROMPT_TOKENS:]
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
