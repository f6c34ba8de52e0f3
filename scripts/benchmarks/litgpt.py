"""litgpt's part of the benchmark: the loop of its `finetune_lora` and the function under its `generate`."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning
import torch
from litgpt import lora, model
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config, configs
from litgpt.data import JSON, get_sft_collate_fn
from litgpt.finetune import lora as finetune
from litgpt.generate import base
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.tokenizer import Tokenizer
from litgpt.utils import instantiate_torch_optimizer, load_checkpoint
from torch import Tensor
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import DataLoader

from benchmarks import jobs
from benchmarks.jobs import Job, Result, serve, versions
from benchmarks.memory import peak_memory_gb

PACKAGES = ("litgpt", "lightning", "torch")
SHAPE = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_query_groups": "num_key_value_heads",
    "n_embd": "hidden_size",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "rope_base": "rope_theta",
}


def converted(job: Job) -> Path:
    """Return the folder with the checkpoint in litgpt's own format."""
    return job.work / "litgpt"


def convert(job: Job) -> None:
    """Write the checkpoint in litgpt's own format."""
    folder = converted(job)
    folder.mkdir()
    for path in job.checkpoint.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    convert_hf_checkpoint(folder, model_name=name_of_shape(job.checkpoint))


def name_of_shape(checkpoint: Path) -> str:
    """Return litgpt's name for a model of this shape."""
    hub_config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    shape = {key: hub_config.get(name) for key, name in SHAPE.items()}
    for known in configs:
        config = Config(**known)
        if all(getattr(config, key) == value for key, value in shape.items()):
            return config.name
    raise SystemExit(f"litgpt has no model of the shape {shape}")


def train(job: Job) -> Result:
    """Fine-tune on the rows, in their order, as litgpt's main does before and around its loop."""
    settings = TrainArgs(
        global_batch_size=job.global_batch_size,
        micro_batch_size=jobs.MICRO_BATCH_SIZE,
        max_steps=job.steps,
        max_seq_length=jobs.MAX_SEQ_LENGTH + 1,  # litgpt counts the last token too, which is only ever a label
        epochs=1,
        save_interval=None,
    )
    fabric = lightning.Fabric(devices=1, precision=job.precision)
    rows, validation = finetune.get_dataloaders(
        fabric, InOrder(json_path=job.data, mask_prompt=True), Tokenizer(converted(job)), settings
    )
    gpt, optimizer = prepare(fabric, job)
    with recorded_losses() as record:
        start = time.perf_counter()
        counts = finetune.fit(
            fabric=fabric,
            model=gpt,
            optimizer=optimizer,
            scheduler=ConstantLR(optimizer, factor=1.0),
            train_dataloader=rows,
            val_dataloader=validation,
            devices=1,
            checkpoint_dir=converted(job),
            out_dir=job.work,
            train=settings,
            eval=EvalArgs(interval=job.steps + 1),
            data=None,
        )
        seconds = time.perf_counter() - start
    return Result(
        seconds=seconds,
        tokens=counts["raw_tokens_plus_prompt_template"] - job.rows,
        supervised=int(sum(record.counts)),
        losses=record.by_step(job.steps),
        memory_gb=peak_memory_gb(),
        versions=versions(*PACKAGES),
    )


def prepare(fabric: lightning.Fabric, job: Job) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return the model with its adapter, and the optimizer."""
    every = job.layers == "all linear layers"
    config = lora.Config.from_file(
        converted(job) / "model_config.yaml",
        lora_r=jobs.RANK,
        lora_alpha=jobs.ALPHA,
        lora_dropout=jobs.DROPOUT,
        lora_query=True,
        lora_value=True,
        **{f"lora_{switch}": every for switch in ("key", "projection", "mlp", "head")},
    )
    with fabric.init_module():
        gpt = lora.GPT(config)
    lora.mark_only_lora_as_trainable(gpt)
    gpt = fabric.setup_module(gpt)
    choice = {"class_path": "torch.optim.AdamW", "init_args": {"lr": jobs.LEARNING_RATE}}
    optimizer = fabric.setup_optimizers(instantiate_torch_optimizer(choice, gpt.parameters()))
    load_checkpoint(fabric, gpt, converted(job) / "lit_model.pth", strict=False)
    return gpt, optimizer


class InOrder(JSON):
    """litgpt's data without shuffling and without worker processes."""

    def train_dataloader(self) -> DataLoader:
        collate = get_sft_collate_fn(max_seq_length=self.max_seq_length, ignore_index=self.ignore_index)
        return DataLoader(self.train_dataset, batch_size=self.batch_size, collate_fn=collate)


@dataclass
class Record:
    """The losses of micro-batches, which litgpt averages without weights."""

    losses: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)

    def by_step(self, steps: int) -> list[float]:
        """Return the mean over the supervised tokens of each step."""
        losses, counts = torch.stack(self.losses).float(), torch.stack(self.counts)
        sums, totals = ((values.view(steps, -1)).sum(1) for values in (losses * counts, counts))
        return (sums / totals).tolist()


@contextmanager
def recorded_losses() -> Iterator[Record]:
    """Record the loss of each micro-batch, and skip validation."""
    record = Record()
    cross_entropy = finetune.chunked_cross_entropy

    def recorded(logits: list[Tensor], targets: Tensor) -> Tensor:
        loss: Tensor = cross_entropy(logits, targets)
        record.losses.append(loss.detach())
        record.counts.append((targets != -100).sum())
        return loss

    def no_validation(*_: Any, **__: Any) -> Tensor:
        return torch.zeros(())

    with patch.multiple(finetune, chunked_cross_entropy=recorded, validate=no_validation):
        yield record


def generate(job: Job) -> Result:
    """Generate greedily twice, and time the second."""
    fabric = lightning.Fabric(devices=1, precision=job.precision)
    prompt = Tokenizer(converted(job)).encode(job.text, device=fabric.device)[: jobs.PROMPT_TOKENS]
    with fabric.init_module(empty_init=True):
        gpt = model.GPT(Config.from_file(converted(job) / "model_config.yaml"))
    with fabric.init_tensor():
        gpt.max_seq_length = jobs.PROMPT_TOKENS + jobs.NEW_TOKENS
        gpt.set_kv_cache(batch_size=1)
    gpt = fabric.setup_module(gpt.eval())
    load_checkpoint(fabric, gpt, converted(job) / "lit_model.pth")
    for _ in range(2):
        start = time.perf_counter()
        output = base.generate(gpt, prompt, jobs.PROMPT_TOKENS + jobs.NEW_TOKENS, temperature=0.0)
        seconds = time.perf_counter() - start
    return Result(
        seconds=seconds,
        tokens=len(output) - len(prompt),
        ids=output.tolist(),
        memory_gb=peak_memory_gb(),
        versions=versions(*PACKAGES),
    )


if __name__ == "__main__":
    serve({"convert": convert, "train": train, "generate": generate})
