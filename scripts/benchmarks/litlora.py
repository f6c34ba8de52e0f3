"""litlora's part of the benchmark: its own commands."""

import csv
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import jobs
from benchmarks.command import time_command
from benchmarks.environments import ROOT
from benchmarks.flags import SEED, generate_flags, train_flags
from benchmarks.jobs import Job, Result, serve, versions
from benchmarks.memory import peak_memory_gb
from litlora.__main__ import run
from litlora.data.batching import epoch_order
from litlora.distributed.launcher import let_threads_sleep
from litlora.generation.sampler import Sampler
from litlora.models.transformer import GPT

PACKAGES = ("litlora", "torch", "bitsandbytes")


def restart_as_command() -> None:
    """Restart this process with the variables that a command sets before torch is imported."""
    before = dict(os.environ)
    let_threads_sleep()
    if dict(os.environ) != before:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def train(job: Job) -> Result:
    """Fine-tune on the rows, once."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        write_in_order(job, Path(scratch))
        time_command(train_flags(job, Path(scratch), folder), job, ROOT, Path(sys.executable))
        report = json.loads((folder / "final/report.json").read_text(encoding="utf-8"))
        with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        # Written just before the first step, and just after each.
        start, end = ((folder / name).stat().st_mtime for name in ("hyperparameters.yaml", "metrics.csv"))
    return Result(
        seconds=end - start,
        tokens=report["tokens"],
        supervised=report["supervised_tokens"],
        losses=losses,
        memory_gb=report["peak_memory_gb"],
        versions=versions(*PACKAGES),
    )


def write_in_order(job: Job, folder: Path) -> None:
    """Write the rows in the order that litlora's shuffle turns into the order of the other programs."""
    lines = (job.data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    visited = epoch_order(job.rows, seed=SEED, epoch=1).tolist()
    ordered = [line for _, line in sorted(zip(visited, lines, strict=True))]
    (folder / "train.jsonl").write_text("\n".join(ordered) + "\n", encoding="utf-8")
    (folder / "val.jsonl").write_bytes((job.data / "val.jsonl").read_bytes())


def generate(job: Job) -> Result:
    """Generate greedily twice and time the second; time compilation separately."""
    restart_as_command()
    module = importlib.import_module("litlora.generation.llm")
    runs: list[tuple[float, list[int]]] = []
    compilations: list[float] = []

    def timed(
        model: GPT, prompt: Sequence[int], sampler: Sampler, count: int, **options: Any
    ) -> Iterator[Iterator[int]]:
        for _ in range(count):  # each with a prompt of its own, as the other programs compute it
            yield complete(model, prompt[: jobs.PROMPT_TOKENS], sampler, options)

    def complete(model: GPT, prompt: Sequence[int], sampler: Sampler, options: dict[str, Any]) -> Iterator[int]:
        start, ids = time.perf_counter(), list(prompt)
        for token in next(samples(model, prompt, sampler, 1, **{**options, "stop_ids": ()})):
            ids.append(token)
            yield token
        runs.append((time.perf_counter() - start, ids))

    def timed_compilation(model: GPT) -> None:
        start = time.perf_counter()
        compile_decode_step(model)
        compilations.append(time.perf_counter() - start)

    samples, compile_decode_step = module.generate_samples, module.compile_decode_step
    with patch.multiple(module, generate_samples=timed, compile_decode_step=timed_compilation):
        run(generate_flags(job))
    seconds, ids = runs[1]
    return Result(
        seconds=seconds,
        tokens=jobs.NEW_TOKENS,
        ids=ids,
        memory_gb=peak_memory_gb(),
        versions=versions(*PACKAGES),
        compile_seconds=sum(compilations),
    )


if __name__ == "__main__":
    serve({"train": train, "generate": generate})
