"""PEFT's and transformers' part of the benchmark: Trainer on a PEFT model, and transformers' own generation."""

import json
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks import jobs
from benchmarks.jobs import Job, Result, serve, versions
from benchmarks.memory import peak_memory_gb

TEMPLATE = "### Instruction:\n{instruction}\n\n### Response:\n"
TEMPLATE_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
TASK = "Below is an instruction that describes a task"
CONTEXT = ", paired with an input that provides further context"
REQUEST = ". Write a response that appropriately completes the request.\n\n"
IGNORE_INDEX = -100


def train(job: Job) -> Result:
    """Fine-tune on the rows, in their order."""
    tokenizer = AutoTokenizer.from_pretrained(job.checkpoint)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = (job.data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [encode(json.loads(line), tokenizer) for line in lines]
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=get_peft_model(load(job), lora_config(job)),
            args=arguments(job, scratch),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[stopwatch],
        )
        trainer.train()
    return Result(
        seconds=stopwatch.seconds,
        tokens=sum(len(row["input_ids"]) - 1 for row in rows),
        supervised=sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:]),
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        memory_gb=peak_memory_gb(),
        versions=versions("peft", "transformers", "accelerate", "torch"),
    )


def encode(row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Tokenize a row, with labels for the response."""
    template, task = (TEMPLATE_WITH_INPUT, TASK + CONTEXT) if row["input"] else (TEMPLATE, TASK)
    prompt = task + REQUEST + template.format(**row)
    encoded = tokenizer(prompt + row["output"] + tokenizer.eos_token, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    labels = [token if end > len(prompt) else IGNORE_INDEX for token, (_, end) in pairs]
    most = jobs.MAX_SEQ_LENGTH + 1  # the last one is only ever a label
    return {"input_ids": encoded["input_ids"][:most], "labels": labels[:most]}


def load(job: Job) -> PreTrainedModel:
    dtype = torch.bfloat16 if job.precision == "bf16-true" else torch.float32
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(
        job.checkpoint,
        dtype=dtype,
        quantization_config=nf4 if job.quantized else None,
        attn_implementation="sdpa",
        device_map={"": job.device},
    )


def lora_config(job: Job) -> LoraConfig:
    modules = "all-linear" if job.layers == "all linear layers" else ["q_proj", "v_proj"]
    return LoraConfig(
        task_type="CAUSAL_LM", r=jobs.RANK, lora_alpha=jobs.ALPHA, lora_dropout=jobs.DROPOUT, target_modules=modules
    )


def arguments(job: Job, scratch: str) -> TrainingArguments:
    """Return the settings of a run without evaluation, saving or a change of the learning rate."""
    return TrainingArguments(
        output_dir=scratch,
        num_train_epochs=1,
        per_device_train_batch_size=jobs.MICRO_BATCH_SIZE,
        gradient_accumulation_steps=job.global_batch_size // jobs.MICRO_BATCH_SIZE,
        train_sampling_strategy="sequential",
        learning_rate=jobs.LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.01,  # torch's default for AdamW, which the other programs use
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


class Stopwatch(TrainerCallback):
    """The time from the start of Trainer's loop to its end."""

    seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.seconds -= time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter()


def generate(job: Job) -> Result:
    """Generate greedily twice, and time the second."""
    model = load(job).eval()
    model.generation_config.eos_token_id = None  # so that all programs generate the same number of tokens
    ids = AutoTokenizer.from_pretrained(job.checkpoint)(job.text)["input_ids"]
    prompt = torch.tensor([ids[: jobs.PROMPT_TOKENS]], device=job.device)
    settings = {"max_new_tokens": jobs.NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    for _ in range(2):
        start = time.perf_counter()
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        seconds = time.perf_counter() - start
    return Result(
        seconds=seconds,
        tokens=output.shape[1] - prompt.shape[1],
        ids=output[0].tolist(),
        memory_gb=peak_memory_gb(),
        versions=versions("transformers", "torch"),
    )


if __name__ == "__main__":
    serve({"train": train, "generate": generate})
