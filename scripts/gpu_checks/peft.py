"""PEFT's part: a loop around transformers' model, with the largest micro-batch that fits.

Rows are packed without padding by transformers' collator, as by TRL's; the loss is computed at supervised positions, in
chunks whose logits are computed again in the backward pass, as by TRL's chunked loss. TRL itself need not be there.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.jobs import Job
from benchmarks.memory import peak_memory_gb
from benchmarks.peft import IGNORE_INDEX, encode, load
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, DataCollatorWithFlattening

from gpu_checks.cases import Work
from gpu_checks.running import ALPHA, RANK, WARM_UP, Result

CHUNK = 1024
"""Positions whose logits exist at one time."""
LEAST = 256
"""Tokens of a micro-batch below which another half would not fit either: a row has as many."""
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train(work: Work) -> Result:
    """Halve the micro-batch until it fits, and time the steps."""
    job = Job("train", "bf16-true", work.folder, quantized=work.quantized, device=work.device)
    rows = read_rows(work)
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=LINEARS)
    model = get_peft_model(load(job), lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    limit = work.most_tokens
    while True:
        try:
            return timed(model, optimizer, rows, limit, work)
        except torch.OutOfMemoryError:
            if limit < LEAST:
                raise
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            limit //= 2


def read_rows(work: Work) -> list[dict[str, list[int]]]:
    """Tokenize the rows as litlora does."""
    tokenizer = AutoTokenizer.from_pretrained(work.checkpoint)
    lines = (work.data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [encode(json.loads(line), tokenizer) for line in lines]


def timed(model: Any, optimizer: Any, rows: list[dict[str, list[int]]], limit: int, work: Work) -> Result:
    """Take the steps with micro-batches of up to `limit` tokens."""
    speeds, supervised, count = [], 0, 0
    for step in range(work.steps):
        batch = [rows[(step * work.rows + index) % len(rows)] for index in range(work.rows)]
        start = time.perf_counter()
        tokens = step_of(model, optimizer, batch, limit, work)
        speeds.append(tokens / (time.perf_counter() - start))
        count += tokens
        supervised += sum(label != IGNORE_INDEX for row in batch for label in row["labels"][1:])
    note = "transformers' padding-free collator, SDPA and a chunked loss; without TRL"
    speed = median(speeds[WARM_UP:] or speeds)
    return Result(note, speed, supervised / count, f"{limit:,} at most", None, peak_memory_gb())


def step_of(model: Any, optimizer: Any, batch: list[dict[str, list[int]]], limit: int, work: Work) -> int:
    """Take one optimizer step, and return its number of tokens."""
    supervised = sum(label != IGNORE_INDEX for row in batch for label in row["labels"][1:])
    total = torch.zeros((), device=work.device)
    for group in grouped(batch, limit):
        inputs = collated(group)
        labels = inputs.pop("labels")[0].roll(-1)
        labels[-1] = IGNORE_INDEX
        loss = chunked_loss(model, {k: v.to(work.device) for k, v in inputs.items()}, labels) / supervised
        loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    total.item()  # which waits for the step
    return sum(len(row["input_ids"]) - 1 for row in batch)


def grouped(batch: list[dict[str, list[int]]], limit: int) -> Iterator[list[dict[str, list[int]]]]:
    """Yield the rows of each micro-batch."""
    group: list[dict[str, list[int]]] = []
    for row in batch:
        if group and sum(len(other["input_ids"]) for other in [*group, row]) > limit:
            yield group
            group = []
        group.append(row)
    yield group


def collated(group: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Concatenate rows into one sequence, whose positions start again with each row."""
    found = DataCollatorWithFlattening(return_tensors="pt")(group)
    return {name: found[name] for name in ("input_ids", "position_ids", "labels")}


def chunked_loss(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropies at the supervised positions."""
    base = model.get_base_model()
    hidden = base.model(**inputs, use_cache=False).last_hidden_state[0]
    positions = torch.nonzero(labels != IGNORE_INDEX).flatten()
    labels, hidden = labels[positions].to(hidden.device), hidden[positions.to(hidden.device)]
    pairs = zip(torch.split(hidden, CHUNK), torch.split(labels, CHUNK), strict=True)
    parts = [checkpoint(chunk_loss, base.lm_head, *pair, use_reentrant=False) for pair in pairs]
    return torch.stack(parts).sum()


def chunk_loss(head: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), labels, reduction="sum")


if __name__ == "__main__":
    print(json.dumps(asdict(train(Work(**json.loads(sys.argv[1]))))))
