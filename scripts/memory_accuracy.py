"""Measure how near the estimate of a run's peak memory is to the peak, on this CPU.

Each setting is a run of its own: litlora finetune_lora for one step, with a validation and a completion, on rows that
all have the same number of tokens. Its report.json has the estimate, made before a weight is loaded, and the peak, both
in 10^9 bytes. The last column compares them without what the process has before: Python, torch and their libraries.
"""

import argparse
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from litlora.cpu.environment import allocator_settings, let_threads_sleep

if __name__ == "__main__" and (settings := allocator_settings()):  # which the C library reads when a process starts
    let_threads_sleep()
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)

import torch
from memory_table import print_table

import litlora.train.setup  # noqa: F401 - so that the process of a setting need not import it
from litlora.__main__ import main
from litlora.train.memory_estimate import PROCESS

COLUMNS = ("model", "setting", "estimated", "measured", "difference", "without the process")
SMOLLM2, GGUF, SMALL, WIDE = "SmolLM2-135M", "SmolLM2-135M, GGUF", "llama", "llama, wide"
TOKENIZER = Path(__file__).parent.parent / "checkpoints/pico"
"""The checkpoint whose tokenizer and vocabulary random models have."""
ALL = tuple(f"--lora_{part} true" for part in ("query", "key", "value", "projection", "mlp"))
EVERY_LAYER = " ".join(ALL)
SIZES = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    SMALL: {"tie_word_embeddings": True},
    WIDE: {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 8},
    "gemma2": {"query_pre_attn_scalar": 64, "sliding_window": 256},
    "gemma3_text": {"query_pre_attn_scalar": 64, "sliding_window": 256},
    "qwen3": {"tie_word_embeddings": False},
    "phi3": {"tie_word_embeddings": True},
    "gpt_neox": {},
    "olmo2": {"tie_word_embeddings": True},
    "phi": {"num_key_value_heads": 4},
    "granite": {"tie_word_embeddings": True, "residual_multiplier": 0.3},
}
"""Keys of random models beside the usual sizes; a model's name begins with its family."""


@dataclass(frozen=True)
class Setting:
    """A run: the model, its micro-batches, and further flags."""

    model: str
    rows: int
    """Examples of a micro-batch."""
    tokens: int
    """Of an example."""
    concurrent: int = 1
    flags: str = ""
    name: str = ""

    @property
    def shape(self) -> list[str]:
        """Return the flags of its micro-batches."""
        flags = {
            "micro_batch_size": self.rows, "micro_batch_tokens": "null", "max_seq_length": self.tokens, "max_steps": 1,
            "global_batch_size": self.rows * self.concurrent, "parallel_micro_batches": self.concurrent,
        }  # fmt: skip
        return [word for name, value in flags.items() for word in (f"--train.{name}", str(value))]

    def __str__(self) -> str:
        """Return what the table shows."""
        size = f"{self.rows} x {self.tokens}" + (f", {self.concurrent} at a time" if self.concurrent > 1 else "")
        return ", ".join(filter(None, (self.name or "bfloat16", size)))


SHORT = """
    --eval.max_iters 1 --eval.max_new_tokens 8 --eval.samples 1 --eval.initial_validation false
    --eval.highest_losses 0 --receipt false --prompt_style alpaca --quiet true
"""
F32, NF4, DQ = "--precision 32-true", "--quantize bnb.nf4", "--quantize bnb.nf4-dq"
CHECKPOINTING = "--train.activation_checkpointing true"
SETTINGS = (
    Setting(SMALL, 8, 512),
    Setting(SMALL, 4, 512, 1, F32, "float32"),
    Setting(SMALL, 16, 512, 1, CHECKPOINTING, "checkpointing"),
    Setting(SMALL, 8, 512, 1, EVERY_LAYER, "all layers"),
    Setting(WIDE, 1, 64, 1, f"{F32} {EVERY_LAYER} --lora_r 128", "float32, rank 128, all layers"),
    Setting("gemma2", 6, 512),
    Setting(SMALL, 4, 512, 2, NF4, "NF4"),
    Setting(SMALL, 4, 512, 1, f"{EVERY_LAYER} --lora_use_dora true", "DoRA, all layers"),
    Setting("gpt_neox", 6, 512),
    Setting("qwen3", 3, 512, 1, F32, "float32"),
    Setting(SMALL, 8, 512, 1, f"{CHECKPOINTING} {F32}", "checkpointing, float32"),
    Setting(SMALL, 1, 2048, 2),
    Setting("phi3", 6, 512),
    Setting("olmo2", 12, 256, 1, NF4, "NF4"),
    Setting("granite", 6, 512, 1, EVERY_LAYER, "all layers"),
    Setting(SMALL, 48, 64),
    Setting(SMALL, 4, 512, 1, "--precision bf16-mixed", "mixed"),
    Setting(SMALL, 4, 512, 1, f"{EVERY_LAYER} --lora_r 128 --lora_use_rslora true", "rsLoRA, rank 128, all layers"),
    Setting(SMALL, 4, 512, 1, '--lora_rank_pattern {"v_proj":64} --lora_layers 8-15', "ranks by pattern"),
    Setting("gemma3_text", 4, 512, 1, f"{NF4} {F32}", "NF4, float32"),
    Setting("phi", 12, 512, 1, CHECKPOINTING, "checkpointing"),
    Setting(SMOLLM2, 1, 512),
    Setting(SMOLLM2, 1, 256, 1, F32, "float32"),
    Setting(GGUF, 1, 512, 1, "", "Q8_0"),
    Setting(SMOLLM2, 1, 512, 1, f"{DQ} {CHECKPOINTING}", "double NF4, checkpointing"),
)


def write_data(folder: Path, rows: int, tokens: int) -> None:
    """Write splits in which each row has more tokens than `tokens`, and another beginning than the others."""
    folder.mkdir()
    for split in ("train", "val"):
        texts = (" ".join(str(row * n) for n in range(tokens * 2 // 3)) for row in range(1, rows + 1))
        pairs = ({"instruction": text[:20], "input": "", "output": text} for text in texts)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def make_random(model: str, folder: Path, tokenizer: Path) -> None:
    """Write a random model of a family in bfloat16, with the tokenizer of another checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    keys = {key: source[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    keys["pad_token_id"] = None  # whose embedding would be zero, and gradients through many norms of it infinite
    config = AutoConfig.for_model(model.partition(",")[0], **SIZES | keys | FAMILIES[model])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)


@dataclass(frozen=True)
class Models:
    """Where the models of the settings are."""

    folder: Path
    """For random models, data and runs."""
    smollm2: Path | None
    gguf: Path | None

    def has(self, model: str) -> bool:
        return model in FAMILIES or (self.smollm2 is not None and (model == SMOLLM2 or self.gguf is not None))

    def flags(self, model: str) -> list[str]:
        """Return the flags that name a model, which is made if it is a random one."""
        if model not in FAMILIES:
            quantized = ["--quantize", str(self.gguf)] if model == GGUF else []
            return ["--checkpoint_dir", str(self.smollm2), *quantized]
        checkpoint = self.folder / model
        if not checkpoint.is_dir():
            in_process(partial(make_random, model, checkpoint, TOKENIZER))
        return ["--checkpoint_dir", str(checkpoint)]


def run(setting: Setting, models: Models) -> dict[str, Any]:
    """Carry out a setting in a process of its own, and return its report."""
    examples = setting.rows * setting.concurrent
    data, out = models.folder / f"data-{examples}-{setting.tokens}", models.folder / "out"
    if not data.is_dir():
        write_data(data, examples, setting.tokens)
    command = ["finetune_lora", "--data_dir", str(data), "--out_dir", str(out), "--overwrite", "true"]
    command += [*models.flags(setting.model), *SHORT.split(), *setting.flags.split(), *setting.shape]
    in_process(partial(train, command, setting.concurrent))
    report: dict[str, Any] = json.loads((out / "final/report.json").read_text(encoding="utf-8"))
    return report


def train(command: Sequence[str], threads: int) -> int:
    """Run a command on few threads: how many there are changes the peak little, and others need the cores as well."""
    torch.set_num_threads(threads)
    return main(command)


def in_process(work: Callable[[], int | None]) -> None:
    """Carry out some work in a copy of this process, which has loaded torch and computed nothing yet."""
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"a run failed: {status}")
        return
    try:
        os._exit(work() or 0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def row(setting: Setting, report: dict[str, Any]) -> tuple[str, ...]:
    """Return the row of a setting."""
    parts = report["estimated_memory_gb"]
    estimated, measured, before = sum(parts.values()), report["peak_memory_gb"], parts[PROCESS]
    shares = estimated / measured, (estimated - before) / (measured - before)
    return setting.model, str(setting), f"{estimated:.2f}", f"{measured:.2f}", *(f"{part - 1:+.0%}" for part in shares)


def rows(models: Models, only: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for setting in SETTINGS:
        if any(text in f"{setting.model}, {setting}" for text in only) and models.has(setting.model):
            report = run(setting, models)
            print(json.dumps(report["estimated_memory_gb"]), report["peak_memory_gb"], file=sys.stderr, flush=True)
            yield row(setting, report)


def measure() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", type=Path, help="folder with SmolLM2-135M, if its settings shall be measured")
    parser.add_argument("--gguf", type=Path, help="the same model in a GGUF file, if its settings shall be measured")
    parser.add_argument("--folder", type=Path, required=True, help="folder for random models, which stay there")
    parser.add_argument("--only", default=[""], nargs="+", help="texts in the names of the settings to be measured")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print_table(COLUMNS, rows(Models(args.folder, args.smollm2, args.gguf), args.only))


if __name__ == "__main__":
    measure()
