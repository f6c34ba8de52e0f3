"""Running a case: commands that end by a time, and what a case reports."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.environments import NO_GPU, QUIET, ROOT
from benchmarks.flags import as_flags

from gpu_checks.cases import Case, Work

RANK, ALPHA = 16, 32
WARM_UP = 2
"""Steps whose time is not counted."""
SWITCHES = ("lora_key", "lora_projection", "lora_mlp")


class CaseError(Exception):
    """A case has no result, for the reason that the message gives."""


@dataclass(frozen=True)
class Result:
    """What a case measured; None where there is nothing of a kind."""

    note: str = ""
    tokens_per_second: float | None = None
    supervised: float | None = None
    """The share of the tokens that are supervised."""
    micro_batch_tokens: str = ""
    predicted_gb: float | None = None
    measured_gb: float | None = None


def run(command: Sequence[str], work: Work, log: str) -> str:
    """Return the stdout of a command; raise its last line on failure, or if it takes too long."""
    extra = {} if work.device == "cuda" else NO_GPU
    path = Path(work.folder) / log
    with path.open("w", encoding="utf-8") as errors:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | QUIET | extra, stdout=subprocess.PIPE, stderr=errors, text=True,
                timeout=max(work.seconds, 1),
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise CaseError(f"stopped after {work.seconds:.0f} s") from error
    if done.returncode:
        lines = (done.stdout + "\n" + path.read_text(encoding="utf-8")).split("\n")
        raise CaseError(next((line for line in reversed(lines) if line.strip()), f"exit code {done.returncode}"))
    return done.stdout


def tests(work: Work) -> Result:
    """Run the tests that need a GPU."""
    if work.device != "cuda":
        return Result("not run: they need a GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    return Result(run(command, work, "tests.log").strip().splitlines()[-1])


def train(work: Work) -> Result:
    """Estimate the memory of a run whose micro-batches follow from the memory, and train."""
    out_dir = Path(work.folder) / f"run-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "litlora", *train_flags(work, out_dir)]
    estimate = run([*command, "--dry_run", "true"], work, "estimate.log")
    run(command, work, "train.log")
    report = json.loads((out_dir / "final/report.json").read_text(encoding="utf-8"))
    with (out_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        speeds = [float(row["tokens_per_second"]) for row in csv.DictReader(file) if row["tokens_per_second"]]
    rows = {line.rsplit(maxsplit=1)[0]: line.split()[-1] for line in estimate.splitlines() if line.strip()}
    return Result(
        tokens_per_second=median(speeds[WARM_UP:] or speeds),
        supervised=report["supervised_tokens"] / report["tokens"],
        micro_batch_tokens=f"auto, {rows['tokens in the longest micro-batch']}",
        predicted_gb=float(rows["peak memory, GB"]),
        measured_gb=report["peak_memory_gb"],
    )


def train_flags(work: Work, out_dir: Path) -> list[str]:
    """Return the command line of a run without validation."""
    settings = {
        "checkpoint_dir": work.checkpoint,
        "data_dir": work.data,
        "out_dir": out_dir,
        "precision": "bf16-true",
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0,
        "prompt_style": "alpaca",
        "train.global_batch_size": work.rows,
        "train.micro_batch_tokens": "auto",
        "train.max_steps": work.steps,
        "train.epochs": work.steps,
        "eval.initial_validation": "false",
        "eval.final_validation": "false",
        "eval.max_new_tokens": 0,
        "eval.highest_losses": 0,
        **dict.fromkeys(SWITCHES, "true"),
        **({"quantize": "bnb.nf4"} if work.quantized else {}),
    }
    return as_flags("finetune_lora", settings)


def in_process(module: str, work: Work) -> Result:
    """Run a module in a process of its own, which prints its result."""
    command = [sys.executable, "-m", f"gpu_checks.{module}", json.dumps(asdict(work))]
    return Result(**json.loads(run(command, work, f"{module}.log").splitlines()[-1]))


def measure(case: Case, work: Work) -> Result:
    """Run a case."""
    if case.task == "tests":
        return tests(work)
    if case.task == "generate":
        return in_process("generation", work)
    return train(work) if case.program == "litlora" else in_process("peft", work)
