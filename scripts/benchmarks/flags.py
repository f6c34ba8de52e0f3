"""litlora's command lines for a job. Imports nothing of litlora, so that they fit any version of it."""

from pathlib import Path
from typing import Any

from benchmarks import jobs
from benchmarks.jobs import Job

SEED = 1337


def train_flags(job: Job, data_dir: Path, out_dir: Path) -> list[str]:
    """Return the command line of a run without validation and with a constant learning rate."""
    every = str(job.layers == "all linear layers").lower()
    settings: dict[str, Any] = {
        "checkpoint_dir": job.checkpoint,
        "data_dir": data_dir,
        "out_dir": out_dir,
        "precision": job.precision,
        "lora_r": jobs.RANK,
        "lora_alpha": jobs.ALPHA,
        "lora_dropout": jobs.DROPOUT,
        "seed": SEED,
        "train.global_batch_size": job.global_batch_size,
        "train.micro_batch_size": jobs.MICRO_BATCH_SIZE,
        "train.micro_batch_tokens": "null",
        "train.max_seq_length": jobs.MAX_SEQ_LENGTH,
        "train.learning_rate": jobs.LEARNING_RATE,
        "train.min_lr": jobs.LEARNING_RATE,
        "train.lr_warmup_steps": 0,
        "eval.initial_validation": "false",
        "eval.final_validation": "false",
        **{f"lora_{switch}": every for switch in ("key", "projection", "mlp", "head")},
        **({"quantize": "bnb.nf4"} if job.quantized else {}),
    }
    return as_flags("finetune_lora", settings)


def generate_flags(job: Job) -> list[str]:
    """Return the command line of two greedy completions."""
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
