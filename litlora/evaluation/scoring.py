"""What a model makes of the rows: their losses, its completions, and the likelihood of each choice."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from lightning_fabric import Fabric

from litlora.args.finetune import Precision, TrainArgs
from litlora.args.inference import GenerateArgs
from litlora.data.batching import Samples, pack
from litlora.data.tokens import Tokens
from litlora.distributed.process_group import Ranks
from litlora.evaluation.engine import Engine
from litlora.evaluation.intervals import Floats
from litlora.evaluation.rows import Subject, Task
from litlora.evaluation.validation import loss_and_tokens
from litlora.generation.batch import Request, complete_all
from litlora.generation.sampler import Sampler
from litlora.lora.checkpoint import load_with_adapters, requested_storage
from litlora.models.checkpoint import Checkpoint
from litlora.models.transformer import GPT, evaluating
from litlora.nn.backend import backend, default_device
from litlora.utils.console import log
from litlora.utils.progress import track


@dataclass(frozen=True)
class Scores:
    """What was measured for each row; empty where no metric needs it."""

    losses: Floats
    """The sum of the losses of a row's supervised tokens (rows,)."""
    tokens: Floats
    """Their number (rows,)."""
    log_likelihoods: Floats
    """Of each choice, with its end token, given the prompt (rows, choices)."""
    completions: list[str]


def score(task: Task, rows: int) -> Scores:
    """Load a model and measure it on the rows."""
    engine = load_engine(task.subject)
    losses, tokens = np.zeros(0), np.zeros(0)
    with evaluating(engine.gpt):
        if task.text is not None:
            losses, tokens = row_losses(engine, task.text, rows, task.subject.args.max_seq_length, "loss")
        choices = [row_losses(engine, text, rows, None, "choices")[0] for text in task.choices]
    likelihoods = -np.stack(choices, axis=1) if choices else np.zeros((0, 0))
    return Scores(losses, tokens, likelihoods, complete(engine.gpt, task))


def load_engine(subject: Subject) -> Engine:
    """Load a model on the first device."""
    gpt = load_model(subject)
    weight = gpt.model.embed_tokens.weight
    one = backend(weight.device)
    workers = one.worker_pool(one.workers(TrainArgs.parallel_micro_batches))
    precision: Precision = "32-true" if weight.dtype is torch.float32 else "bf16-true"
    return Engine(gpt, Fabric(devices=1), precision, workers, Ranks(0, 1, weight.device))


def load_model(subject: Subject) -> GPT:
    """Load a model with its adapters on the first device."""
    dtype, quantization = requested_storage(subject.args, subject.adapters)
    return load_with_adapters(Checkpoint.open(subject.base), subject.adapters, dtype, default_device(), quantization)


def row_losses(engine: Engine, text: Tokens, rows: int, limit: int | None, name: str) -> tuple[Floats, Floats]:
    """Return the sums of the losses of each row's supervised tokens, and their numbers."""
    samples = Samples(text, engine.gpt.config.positions if limit is None else limit)
    if samples.truncated:
        cut = f"{samples.truncated:,} rows are cut to --max_seq_length"
        log(f"{cut}, and {samples.dropped:,} have no response left")
    losses, tokens = np.zeros(rows), np.zeros(rows)
    each = [samples[index] for index in range(len(samples))]
    results = engine.workers.map(partial(loss_and_tokens, engine), (pack([sample]) for sample in each))
    for sample, (loss, count) in zip(each, track(results, name, len(each)), strict=True):
        losses[sample.row - 1] += loss
        tokens[sample.row - 1] += count
    return losses, tokens


def complete(model: GPT, task: Task) -> list[str]:
    """Return the greedy completion of each prompt; they are computed together."""
    limit, tokenizer = task.subject.args.max_new_tokens, task.subject.tokenizer
    requests = [Request(ids, limit) for ids in task.prompts]
    stop_ids, batch_size = tokenizer.stop_ids_of(task.subject.style), GenerateArgs.batch_size
    found = complete_all(model, requests, Sampler(), stop_ids=stop_ids, batch_size=batch_size)
    completions = dict(track(found, "completions", len(requests)))
    return ["".join(tokenizer.stream(ids, completions[n])) for n, ids in enumerate(task.prompts)]
