"""Write a checkpoint with random weights in one of memory_table.py's shapes and the tokenizer of another checkpoint."""

import argparse
import json
import shutil
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from memory_table import SHAPES, config
from safetensors.torch import save_file
from torch import Tensor

from litlora.data.tokenizer import Tokenizer
from litlora.hub.filenames import CONFIG, INDEX
from litlora.models.checkpoint_files import read_hub_config
from litlora.models.config import GPTConfig
from litlora.models.transformer import GPT
from litlora.utils.files import atomic_directory

SEED = 2026
STD = 0.02
SPECIAL = ("bos_token_id", "eos_token_id")
OF_VOCABULARY = {"model.embed_tokens.weight", "lm_head.weight"}


CPU = torch.device("cpu")


def make(folder: Path, shape: GPTConfig, tokenizer: Path, device: torch.device = CPU) -> None:
    """Write the checkpoint, with at most one block in memory at a time; a GPU draws weights far faster than a CPU."""
    source = Tokenizer(tokenizer)
    with atomic_directory(folder) as partial:
        write_json(partial / CONFIG, hub_config(shape, read_hub_config(tokenizer)))
        write_weights(partial, shape, source, device)
        for path in source.files:
            shutil.copyfile(path, partial / path.name)


def hub_config(shape: GPTConfig, other: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of a shape, with the special token ids of the tokenizer's checkpoint."""
    special = {key: other[key] for key in SPECIAL if key in other}
    keys = asdict(shape) | {"rms_norm_eps": shape.norm_eps}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **keys, **special}


def write_weights(folder: Path, shape: GPTConfig, tokenizer: Tokenizer, device: torch.device) -> None:
    """Write one file per block and per weight outside the blocks, and their index."""
    generator = torch.Generator(device).manual_seed(SEED)
    groups = [dict(group) for _, group in groupby(shapes(shape).items(), key=lambda item: block(item[0]))]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {weight: random_weight(size, generator) for weight, size in group.items()}
        for weight in OF_VOCABULARY & tensors.keys():
            zero_silent_tokens(tensors[weight], tokenizer)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(2 * size.numel() for group in groups for size in group.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def shapes(shape: GPTConfig) -> dict[str, torch.Size]:
    """Return the shape of each weight by name, in the order of the blocks."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in GPT(shape).named_parameters()}


def block(name: str) -> str:
    """Return the name of the block that a weight belongs to, or the weight's own name."""
    return ".".join(name.split(".")[:3])


def random_weight(size: torch.Size, generator: torch.Generator) -> Tensor:
    """Return ones for a norm, and small random numbers for a matrix."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    weight = torch.empty(size, dtype=torch.bfloat16, device=generator.device)
    return weight.normal_(std=STD, generator=generator).cpu()


def zero_silent_tokens(weight: Tensor, tokenizer: Tokenizer) -> None:
    """Zero the rows of ids without text and of stop tokens, so that greedy decoding yields text of any length."""
    weight[tokenizer.vocab_size :] = 0
    weight[sorted(tokenizer.stop_ids)] = 0


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True, help="shape of the model")
    parser.add_argument("--tokenizer", type=Path, required=True, help="checkpoint folder to copy the tokenizer from")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    args = parser.parse_args()
    make(args.out, config(args.shape), args.tokenizer)


if __name__ == "__main__":
    main()
