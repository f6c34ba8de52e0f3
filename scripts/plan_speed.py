"""Measure the speed of the plan that memory decides against a grid of fixed micro-batches, on this CPU.

Each run is a process of its own: litlora finetune_lora for a few steps, the first of which does not count. The runs
of a model take turns, and the fastest of each setting counts: what else the machine does only makes a run slower.
"""

import argparse
import csv
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from litlora.cpu.environment import allocator_settings, let_threads_sleep

if __name__ == "__main__" and (settings := allocator_settings()):  # which the C library reads when a process starts
    let_threads_sleep()
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)

import torch
from memory_accuracy import SHORT, SMOLLM2, TOKENIZER, in_process, train
from memory_table import print_table

COLUMNS = ("model", "base", "plan, tokens x concurrent", "tokens/s", "best fixed, tokens", "tokens/s", "share")
AUTO = "auto"
PICO = "pico"
BASES = {"bfloat16": "", "NF4": "--quantize bnb.nf4"}
GRID = {SMOLLM2: ("256", "512", "1024", "2048", "4096"), PICO: ("128", "256", "512", "1024", "2048")}
"""Tokens of a fixed micro-batch."""
STEPS = {SMOLLM2: 3, PICO: 30}
WORDS = (15, 25, 35, 45, 60, 75, 90, 100, 40, 30, 55, 20, 85, 65, 50, 70)
"""Lengths of the rows, in turn."""
TEXT = (
    "In the morning the old harbour fills with small boats, and people carry baskets of fish up the steep street while "
)


@dataclass(frozen=True)
class Speed:
    """Of a run: how it was split, and how fast it was."""

    plan: str
    tokens_per_second: float


def write_data(folder: Path) -> None:
    """Write rows with lengths like Alpaca's, which share no prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    words = TEXT.split()
    texts = [" ".join(words[(row + n * row) % len(words)] for n in range(WORDS[row % len(WORDS)])) for row in range(96)]
    rows = ({"instruction": f"{row} {text[:40]}", "input": "", "output": text} for row, text in enumerate(texts))
    lines = [json.dumps(row) + "\n" for row in rows]
    for split, chosen in {"train": lines[2:], "val": lines[:2]}.items():
        (folder / f"{split}.jsonl").write_text("".join(chosen), encoding="utf-8")


def measure(model: str, base: str, tokens: str, folder: Path, checkpoint: Path) -> Speed:
    """Train for a few steps, and return the speed of those after the first."""
    data, out = folder / "rows", folder / "speed"
    if not data.is_dir():
        write_data(data)
    shutil.rmtree(out, ignore_errors=True)
    folders = {"checkpoint_dir": checkpoint, "data_dir": data, "out_dir": out, "train.micro_batch_tokens": tokens}
    command = ["finetune_lora", *(text for name, value in folders.items() for text in (f"--{name}", str(value)))]
    command += [*SHORT.split(), *BASES[base].split(), "--train.max_steps", str(STEPS[model]), "--train.epochs", "100"]
    command += ["--eval.final_validation", "false", "--eval.max_new_tokens", "0"]
    in_process(partial(train, command, torch.get_num_threads()))
    report = json.loads((out / "final/report.json").read_text(encoding="utf-8"))
    plan = report["plan"] and "{micro_batch_tokens} x {parallel_micro_batches}".format(**report["plan"])
    return Speed(plan or tokens, speed_of(out / "metrics.csv"))


def speed_of(metrics: Path) -> float:
    """Return tokens per second of the steps after the first."""
    with metrics.open(encoding="utf-8", newline="") as file:
        steps = [row for row in csv.DictReader(file) if row["tokens_per_second"]]
    counted = [(int(row["tokens"]) - int(before["tokens"]), float(row["tokens_per_second"]))
               for before, row in pairwise(steps)]  # fmt: skip
    return sum(tokens for tokens, _ in counted) / sum(tokens / speed for tokens, speed in counted)


def compare(model: str, base: str, folder: Path, checkpoint: Path, rounds: int) -> tuple[str, ...]:
    """Return the row of a model over a base."""
    best: dict[str, Speed] = {}
    for _ in range(rounds):
        for tokens in (AUTO, *GRID[model]):
            speed = measure(model, base, tokens, folder, checkpoint)
            print(f"{model}, {base}, {tokens}: {speed.tokens_per_second:.0f} tokens/s", file=sys.stderr, flush=True)
            if tokens not in best or speed.tokens_per_second > best[tokens].tokens_per_second:
                best[tokens] = speed
    planned = best.pop(AUTO)
    fixed = max(best.values(), key=lambda speed: speed.tokens_per_second)
    share = f"{planned.tokens_per_second / fixed.tokens_per_second:.0%}"
    return (
        model,
        base,
        planned.plan,
        f"{planned.tokens_per_second:.0f}",
        fixed.plan,
        f"{fixed.tokens_per_second:.0f}",
        share,
    )


def rows(checkpoints: dict[str, Path], only: Sequence[str], folder: Path, rounds: int) -> Iterator[tuple[str, ...]]:
    for model, checkpoint in checkpoints.items():
        for base in BASES:
            if any(text in f"{model}, {base}" for text in only):
                yield compare(model, base, folder, checkpoint, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", type=Path, help="folder with SmolLM2-135M, if it shall be measured")
    parser.add_argument("--folder", type=Path, required=True, help="folder for rows and runs")
    parser.add_argument("--only", default=[""], nargs="+", help="texts in the names of what shall be measured")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each setting")
    args = parser.parse_args()
    checkpoints = {PICO: TOKENIZER} | ({SMOLLM2: args.smollm2} if args.smollm2 else {})
    print_table(COLUMNS, rows(checkpoints, args.only, args.folder, args.rounds))


if __name__ == "__main__":
    main()
