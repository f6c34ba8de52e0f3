"""Measure the speed of the plan that memory decides against a grid of fixed micro-batches, on this CPU.

One process trains a model over a base, and takes the same step under each plan in turn, so that a machine whose pace
changes slows all of them down. The first round, in which kernels are made, does not count; the share is the median of
the ratios of the others.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Literal

from litlora.cpu.environment import allocator_settings, let_threads_sleep

if __name__ == "__main__" and (settings := allocator_settings()):  # which the C library reads when a process starts
    let_threads_sleep()
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)

from memory_accuracy import SMOLLM2, TOKENIZER
from memory_table import print_table

from litlora.args.finetune import FinetuneLoraArgs, TrainArgs
from litlora.data.batching import Sample
from litlora.train.inputs import find_inputs, read_data, run_folder
from litlora.train.loop import Run, train_step
from litlora.train.network_shape import Network
from litlora.train.planned_run import PlannedRun
from litlora.train.schedule import steps
from litlora.train.setup import build_run, follow_plan, joined, under_plan
from litlora.utils.signals import StopRequest

COLUMNS = ("model", "base", "plan", "tokens/s", "best of the grid", "tokens/s", "share")
PICO = "pico"
BASES: dict[str, Literal["bnb.nf4"] | None] = {"bfloat16": None, "NF4": "bnb.nf4"}
GRID = {SMOLLM2: (256, 512, 1024, 2048, 4096), PICO: (128, 256, 512, 1024, 2048)}
"""Tokens of a fixed micro-batch."""
RATE = 1e-5
WORDS = (15, 25, 35, 45, 60, 75, 90, 100, 40, 30, 55, 20, 85, 65, 50, 70)
"""Lengths of the rows, in turn."""
TEXT = (
    "In the morning the old harbour fills with small boats, and people carry baskets of fish up the steep street while "
)


def write_data(folder: Path) -> None:
    """Write rows with lengths like Alpaca's, which share no prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    words = TEXT.split()
    texts = [" ".join(words[(row + n * row) % len(words)] for n in range(WORDS[row % len(WORDS)])) for row in range(96)]
    rows = ({"instruction": f"{row} {text[:40]}", "input": "", "output": text} for row, text in enumerate(texts))
    lines = [json.dumps(row) + "\n" for row in rows]
    for split, chosen in {"train": lines[2:], "val": lines[:2]}.items():
        (folder / f"{split}.jsonl").write_text("".join(chosen), encoding="utf-8")


@dataclass(frozen=True)
class Times:
    """What the same steps take under several plans."""

    plans: list[str]
    """Memory's plan first."""
    seconds: list[list[float]]
    """Of each round, by plan."""
    tokens: float
    """Of a step."""


def measure(args: FinetuneLoraArgs, grid: Sequence[int], rounds: int) -> Times:
    """Take a step of each round under every plan; each round begins with another one."""
    with joined(args) as (fabric, ranks):
        inputs = find_inputs(args, None, fabric.device, ranks)
        folder, data = run_folder(inputs.args, inputs, ranks), read_data(inputs.args, inputs, ranks)
        network = Network.of(inputs.args, inputs.checkpoint, folder.lora, fabric.device)
        planned = PlannedRun.of(inputs.args, network, data.train, ranks)
        settings = [replace(inputs.args, train=replace(args.train, micro_batch_tokens=tokens)) for tokens in grid]
        plans = [planned, *(PlannedRun.of(fixed, network, data.train, ranks) for fixed in settings)]
        run, _ = build_run(planned, inputs, data, folder, fabric, ranks, StopRequest(None), None)
        runs = [(plan, under_plan(run, plan, data)) for plan in plans]
        size = args.train.global_batch_size
        batches = [batch for *_, batch in steps(data.train, size, args.seed, after=0, total=rounds + 1)]
        seconds = [seconds_of(runs, batch, first=number % len(runs)) for number, batch in enumerate(batches)]
    return Times([named(plan.args.train) for plan in plans], seconds[1:], float(data.train.lengths.mean()) * size)


def named(train: TrainArgs) -> str:
    """Return how a step is split, in words."""
    checkpointing = ", checkpointing" if train.recomputes else ""
    return f"{train.micro_batch_tokens:,} tokens x {train.parallel_micro_batches}{checkpointing}"


def seconds_of(runs: Sequence[tuple[PlannedRun, Run]], batch: list[Sample], first: int) -> list[float]:
    """Return the seconds that a step takes under each plan."""
    found = {}
    for index in (*range(first, len(runs)), *range(first)):
        planned, run = runs[index]
        follow_plan(run.engine.gpt, planned)  # the model is the same for all
        start = perf_counter()
        train_step(run, batch, RATE, 1)
        found[index] = perf_counter() - start
    return [found[index] for index in range(len(runs))]


def compare(model: str, base: str, folder: Path, checkpoint: Path, rounds: int) -> tuple[str, ...]:
    """Return the row of a model over a base."""
    args = FinetuneLoraArgs(
        checkpoint, folder / "rows", folder / "run", quantize=BASES[base], prompt_style="alpaca", quiet=True
    )
    times = measure(args, GRID[model], rounds)
    typical = [median(column) for column in zip(*times.seconds, strict=True)]
    speeds = [f"{times.tokens / seconds:.0f}" for seconds in typical]
    for plan, speed in zip(times.plans, speeds, strict=True):
        print(f"{model}, {base}, {plan}: {speed} tokens/s", file=sys.stderr, flush=True)
    best = min(range(1, len(speeds)), key=typical.__getitem__)
    share = f"{median(row[best] / row[0] for row in times.seconds):.1%}"
    same = " (the same plan)" if times.plans[best] == times.plans[0] else ""
    return model, base, times.plans[0], speeds[0], times.plans[best], speeds[best], share + same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", type=Path, help="folder with SmolLM2-135M, if it shall be measured")
    parser.add_argument("--folder", type=Path, required=True, help="folder for rows")
    parser.add_argument("--only", default=[""], nargs="+", help="texts in the names of what shall be measured")
    parser.add_argument("--rounds", type=int, default=5, help="steps under each plan")
    args = parser.parse_args()
    if not (args.folder / "rows").is_dir():
        write_data(args.folder / "rows")
    checkpoints = {PICO: TOKENIZER} | ({SMOLLM2: args.smollm2} if args.smollm2 else {})
    print_table(COLUMNS, rows(checkpoints, args.only, args.folder, args.rounds))


def rows(checkpoints: dict[str, Path], only: Sequence[str], folder: Path, rounds: int) -> Iterator[tuple[str, ...]]:
    """Yield a row for each model and base."""
    for model, checkpoint in checkpoints.items():
        for base in BASES:
            if any(text in f"{model}, {base}" for text in only):
                yield compare(model, base, folder, checkpoint, rounds)


if __name__ == "__main__":
    main()
