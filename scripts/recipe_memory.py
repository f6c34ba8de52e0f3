"""Print the memory that each recipe in config_hub needs on a GPU, as --dry_run true estimates it there.

A micro-batch has one example of max_seq_length tokens, all supervised: with more memory, the plan of a run takes larger
ones. No weight is read: a model is its config.json; MODELS has the keys that decide shapes.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from litlora.args.finetune import FinetuneLoraArgs
from litlora.cli.parser import Call, parse
from litlora.models.checkpoint import Checkpoint
from litlora.models.config import GPTConfig
from litlora.models.weights import Weights
from litlora.train.lora_flags import new_adapter
from litlora.train.memory_check import USABLE
from litlora.train.memory_estimate import breakdown
from litlora.train.network_shape import Load, Network

RECIPES = Path(__file__).parent.parent / "config_hub/finetune_lora"
LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}  # the values have no effect here
GPUS = (4, 6, 8, 12, 16, 24, 32, 48, 80)
"""Sizes of GPUs in GB."""
KEYS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings",
)  # fmt: skip
MODELS: dict[str, tuple[Any, ...]] = {
    "gemma-2-2b": ("gemma2", 256000, 2304, 9216, 26, 8, 4, 256, True),
    "gemma-2-9b": ("gemma2", 256000, 3584, 14336, 42, 16, 8, 256, True),
    "gemma-3-1b": ("gemma3_text", 262144, 1152, 6912, 26, 4, 1, 256, True),
    "llama-2-7b": ("llama", 32000, 4096, 11008, 32, 32, 32, 128, False),
    "llama-2-70b": ("llama", 32000, 8192, 28672, 80, 64, 8, 128, False),
    "llama-3.1-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, 128, False),
    "llama-3.2-1b": ("llama", 128256, 2048, 8192, 16, 32, 8, 64, True),
    "llama-3.2-3b": ("llama", 128256, 3072, 8192, 28, 24, 8, 128, True),
    "mistral-7b": ("mistral", 32768, 4096, 14336, 32, 32, 8, 128, False),
    "phi-4-mini": ("phi3", 200064, 3072, 8192, 32, 24, 8, 128, True),
    "qwen2.5-0.5b": ("qwen2", 151936, 896, 4864, 24, 14, 2, 64, True),
    "qwen2.5-1.5b": ("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, True),
    "qwen2.5-3b": ("qwen2", 151936, 2048, 11008, 36, 16, 2, 128, True),
    "qwen2.5-7b": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
    "qwen3-0.6b": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True),
    "qwen3-1.7b": ("qwen3", 151936, 2048, 6144, 28, 16, 8, 128, True),
    "qwen3-4b": ("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True),
    "qwen3-8b": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
    "smollm2-135m": ("llama", 49152, 576, 1536, 30, 9, 3, 64, True),
    "smollm2-360m": ("llama", 49152, 960, 2560, 32, 15, 5, 64, True),
    "smollm2-1.7b": ("llama", 49152, 2048, 8192, 24, 32, 32, 64, True),
    "smollm3-3b": ("smollm3", 128256, 2048, 11008, 36, 16, 4, 128, True),
    "tinyllama-1.1b": ("llama", 32000, 2048, 5632, 22, 32, 4, 64, False),
}
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 4096, "query_pre_attn_scalar": 256},
    "gemma3_text": {"sliding_window": 512, "query_pre_attn_scalar": 256},
    "phi3": {
        "partial_rotary_factor": 0.75, "original_max_position_embeddings": 4096, "rope_scaling": LONGROPE,
        "pad_token_id": 0,
    },
    "mistral": {"sliding_window": None},
}  # fmt: skip
"""Keys of a family that its defaults do not give."""


def recipes() -> list[Path]:
    """Return the recipes of the models above."""
    return sorted(path for path in RECIPES.glob("*/*.yaml") if path.parent.name in MODELS)


def read(path: Path) -> FinetuneLoraArgs:
    """Return the settings of a recipe."""
    call = parse(["finetune_lora", "--config", str(path)])
    assert isinstance(call, Call)
    return call.args


def outline(model: str) -> Checkpoint:
    """Return a model's checkpoint without weights."""
    hub = hub_config(model)
    return Checkpoint(Path(model), hub, GPTConfig.from_hub(hub), Weights(Path(model), []))


def hub_config(model: str) -> dict[str, Any]:
    """Return the keys of a model's config.json that decide shapes."""
    values = dict(zip(KEYS, MODELS[model], strict=True))
    return {"max_position_embeddings": 131072} | values | OTHERS.get(values["model_type"], {})


def peak_gigabytes(path: Path) -> float:
    """Return the peak memory of a recipe on each of its GPUs, with the smallest micro-batches."""
    args, checkpoint = read(path), outline(path.parent.name)
    shards = args.devices if args.strategy == "fsdp" else 1
    lora = new_adapter(args, checkpoint.config)
    network = Network(checkpoint.config, lora, args.precision, args.quantize, torch.device("cuda"), shards)
    longest = args.train.max_seq_length or 0
    load = Load((longest,), longest, args.train.recomputes)
    return sum(breakdown(network, load, args.optimizer).values()) / 1e9


def statement(path: Path) -> str:
    """Return what a recipe states of its memory."""
    peak = round(peak_gigabytes(path), 1)
    size = next(size for size in GPUS if peak <= USABLE * size)
    return f"Needs {peak} GB on {'each' if read(path).devices > 1 else 'a'} GPU, so {size} GB are enough."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the figures into the recipes")
    write = parser.parse_args().write
    for path in recipes():
        stated = statement(path)
        print(f"{path.parent.name}/{path.name}: {stated}")
        if write:
            text = path.read_text(encoding="utf-8")
            path.write_text(re.sub(r"Needs .*", stated, text, count=1), encoding="utf-8")


if __name__ == "__main__":
    main()
