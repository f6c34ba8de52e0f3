"""Runs of finetune_lora, and what they leave."""

import csv
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from litlora.__main__ import main

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "--precision 32-true --lora_dropout 0 --eval.max_new_tokens 0 --train.learning_rate 1e-2"
QUERY_VALUE = [
    "--lora_r",
    "8",
    "--lora_alpha",
    "16",
    "--lora_key",
    "false",
    "--lora_projection",
    "false",
    "--lora_mlp",
    "false",
]
"""Flags of an adapter on query and value, for tests whose numbers are those of one."""


def finetune(checkpoint: Path, data_dir: Path, out_dir: Path, *flags: object) -> Path:
    """Run finetune_lora in float32 and return its final adapter."""
    folders = ["--checkpoint_dir", checkpoint, "--data_dir", data_dir, "--out_dir", out_dir]
    assert main(["finetune_lora", *map(str, folders), *SETTINGS.split(), *QUERY_VALUE, *map(str, flags)]) == 0
    return out_dir / "final"


def adapter(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, WEIGHTS))


def same_adapter(folder: Path | str, other: Path | str) -> bool:
    """Tell whether two adapters are identical, bit for bit."""
    one, two = adapter(folder), adapter(other)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in two)


def report(folder: Path | str) -> dict[str, float]:
    return json.loads(Path(folder, "report.json").read_text(encoding="utf-8"))


def metrics(out_dir: Path | str) -> list[dict[str, str]]:
    with Path(out_dir, "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
