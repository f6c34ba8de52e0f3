"""litlora's part of the benchmark: its own commands, timed from inside."""

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
from benchmarks.jobs import Job, Result, serve, versions
from benchmarks.memory import peak_memory_gb
from litlora.__main__ import run
from litlora.data.batching import epoch_order
from litlora.distributed.launcher import environment, let_threads_sleep
from litlora.models.transformer import GPT

PACKAGES = ("litlora", "torch", "bitsandbytes")
SEED = 1337


def restart_as_command(*, launched: bool) -> None:
    """Restart this process with the variables that a command, or the launcher for it, sets before torch is imported."""
    before = dict(os.environ)
    let_threads_sleep()
    os.environ.update(environment(1) if launched else {})
    if dict(os.environ) != before:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def train(job: Job) -> Result:
    """Fine-tune on the rows, once."""
    restart_as_command(launched=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        write_in_order(job, Path(scratch))
        run(train_flags(job, Path(scratch)))
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
        memory_gb=peak_memory_gb(),
        versions=versions(*PACKAGES),
    )


def train_flags(job: Job, scratch: Path) -> list[str]:
    """Return the command line of a run without validation and without a change of the learning rate."""
    switches = ("key", "projection", "mlp", "head") if job.layers == "all linear layers" else ()
    settings: dict[str, Any] = {
        "checkpoint_dir": job.checkpoint,
        "data_dir": scratch,
        "out_dir": scratch / "run",
        "precision": job.precision,
        "lora_r": jobs.RANK,
        "lora_alpha": jobs.ALPHA,
        "lora_dropout": jobs.DROPOUT,
        "seed": SEED,
        "train.global_batch_size": job.global_batch_size,
        "train.micro_batch_size": jobs.MICRO_BATCH_SIZE,
        "train.max_seq_length": jobs.MAX_SEQ_LENGTH,
        "train.learning_rate": jobs.LEARNING_RATE,
        "train.min_lr": jobs.LEARNING_RATE,
        "train.lr_warmup_steps": 0,
        "eval.initial_validation": "false",
        "eval.final_validation": "false",
        **{f"lora_{switch}": "true" for switch in switches},
        **({"quantize": "bnb.nf4"} if job.quantized else {}),
    }
    return as_flags("finetune_lora", settings)


def write_in_order(job: Job, folder: Path) -> None:
    """Write the data so that, once litlora has shuffled it, it is visited as the other programs visit it."""
    lines = (job.data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    visited = epoch_order(job.rows, seed=SEED, epoch=1).tolist()
    ordered = [line for _, line in sorted(zip(visited, lines, strict=True))]
    (folder / "train.jsonl").write_text("\n".join(ordered) + "\n", encoding="utf-8")
    (folder / "val.jsonl").write_bytes((job.data / "val.jsonl").read_bytes())


def generate(job: Job) -> Result:
    """Generate greedily twice, and time the second: the first warms up; compiling is timed apart."""
    restart_as_command(launched=False)
    command = importlib.import_module("litlora.commands.generate")
    runs: list[tuple[float, list[int]]] = []
    compilations: list[float] = []

    def timed(model: GPT, prompt: Sequence[int], *arguments: Any, **options: Any) -> Iterator[int]:
        start, ids = time.perf_counter(), list(prompt[: jobs.PROMPT_TOKENS])
        for token in stream(model, tuple(ids), *arguments, **{**options, "stop_ids": ()}):
            ids.append(token)
            yield token
        runs.append((time.perf_counter() - start, ids))

    def timed_compilation(model: GPT) -> None:
        start = time.perf_counter()
        compile_step(model)
        compilations.append(time.perf_counter() - start)

    stream, compile_step = command.stream_tokens, command.compile_step
    with patch.multiple(command, stream_tokens=timed, compile_step=timed_compilation):
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


def generate_flags(job: Job) -> list[str]:
    settings: dict[str, Any] = {
        "checkpoint_dir": job.checkpoint,
        "prompt": job.text,
        "precision": job.precision,
        "max_new_tokens": jobs.NEW_TOKENS,
        "temperature": 0,
        "num_samples": 2,
        "compile": str(job.compiled).lower(),
    }
    return as_flags("generate", settings)


def as_flags(command: str, settings: dict[str, Any]) -> list[str]:
    return [command, *(text for name, value in settings.items() for text in (f"--{name}", str(value)))]


if __name__ == "__main__":
    serve({"train": train, "generate": generate})
