"""What the cases run on: random checkpoints, and rows of the lengths of Alpaca."""

import json
import random
from pathlib import Path

import make_random_checkpoint
import torch
from benchmarks.environments import ROOT

from gpu_checks.cases import config_of

TOKENIZER = ROOT / "checkpoints/pico"
SEED = 2026
WORDS = 12, 120
"""The fewest and the most words of a response."""


def write_data(folder: Path, rows: int) -> None:
    """Write rows whose responses are made of those of the data that ships."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (ROOT / "data/pico/train.jsonl").read_text(encoding="utf-8").splitlines()
    words = [word for line in lines for word in json.loads(line)["instruction"].split()]
    draw = random.Random(SEED)
    texts = [" ".join(draw.choices(words, k=draw.randint(*WORDS))) for _ in range(rows)]
    written = [json.dumps({"instruction": f"Write text {n}.", "input": "", "output": t}) for n, t in enumerate(texts)]
    (folder / "train.jsonl").write_text("\n".join(written) + "\n", encoding="utf-8")
    (folder / "val.jsonl").write_text(written[0] + "\n", encoding="utf-8")


def write_checkpoint(folder: Path, shape: str, device: str) -> None:
    """Write random weights of a shape, drawn on the device: a CPU would take minutes."""
    make_random_checkpoint.make(folder, config_of(shape), TOKENIZER, torch.device(device))
    torch.cuda.empty_cache()  # for the cases, which are processes of their own
