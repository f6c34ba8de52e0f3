"""Copies of a trained network, what can be wrong with them, and their verification."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from litlora.__main__ import main

WEIGHTS, CONFIG, STORED = "adapter_model.safetensors", "adapter_config.json", "model.safetensors"
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
DIFFERENT = "log-probabilities differ by"
Tensors = dict[str, torch.Tensor]


class Fault(NamedTuple):
    """What is wrong with a copy, and what the verdict says."""

    change: Callable[..., object]
    """Takes the folder, and that of the base where it needs one."""
    verdict: str


def verify(folder: Path, *flags: object) -> int:
    return main(["verify", str(folder), *map(str, flags)])


def export(source: Path, out_dir: Path, *flags: object) -> Path:
    """Export a receipt's network, unverified, and return the folder."""
    command = ["export", str(source), "--out_dir", str(out_dir), "--verify", "false"]
    assert main([*command, *map(str, flags)]) == 0
    return out_dir


def merge(adapter: Path, out_dir: Path) -> Path:
    """Merge an adapter, unverified, and return the folder."""
    assert main(["merge_lora", str(adapter), "--out_dir", str(out_dir), "--verify", "false"]) == 0
    return out_dir


def changed(folder: Path, out_dir: Path, change: Callable[..., object], *others: Path) -> Path:
    """Copy a folder, and apply a change to the copy."""
    shutil.copytree(folder, out_dir)
    change(out_dir, *others)
    return out_dir


def edit_json(path: Path, **values: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(content | values), encoding="utf-8")


def edit_weights(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path, metadata)


def edit_each(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    edit_weights(path, lambda tensors: {name: change(each) for name, each in tensors.items()})


def edit_tokenizer(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    change(content)
    (folder / TOKENIZER).write_text(json.dumps(content), encoding="utf-8")


def edit_number(file: Path, key: str, number: int) -> None:
    """Change a 32-bit number in the metadata of a GGUF file."""
    content = file.read_bytes()
    head = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", 4)
    start = content.index(head) + len(head)
    file.write_bytes(content[:start] + struct.pack("<I", number) + content[start + 4 :])


def swapped_layers(tensors: Tensors) -> Tensors:
    other = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    return {name.replace(name[23:32], other[name[23:32]]): each for name, each in tensors.items()}


def one_layer_zero(tensors: Tensors) -> Tensors:
    name = next(name for name in tensors if "lora_B" in name)
    return tensors | {name: 0 * tensors[name]}


def renamed(tensors: Tensors) -> Tensors:
    return {name.replace("base_model.model.", ""): each for name, each in tensors.items()}


def swapped_matrices(tensors: Tensors) -> Tensors:
    pairs = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return {name.replace(kind, pairs[kind]): each.T for name, each in tensors.items() for kind in pairs if kind in name}


def add_bos(content: dict) -> None:
    piece, bos = [{"Sequence": {"id": "A", "type_id": 0}}], {"SpecialToken": {"id": "<s>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [bos, *piece], "pair": [bos, *piece],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }  # fmt: skip


def other_merges(content: dict) -> None:
    content["model"]["merges"].pop(0)


ADAPTER_FAULTS = {
    "scale ignored": Fault(lambda f: edit_json(f / CONFIG, lora_alpha=8), DIFFERENT),
    "alpha not divided by r": Fault(lambda f: edit_json(f / CONFIG, lora_alpha=16 * 8), DIFFERENT),
    "rsLoRA": Fault(lambda f: edit_json(f / CONFIG, use_rslora=True), DIFFERENT),
    "A of another layer": Fault(lambda f: edit_weights(f / WEIGHTS, swapped_layers), DIFFERENT),
    "one layer zero": Fault(lambda f: edit_weights(f / WEIGHTS, one_layer_zero), DIFFERENT),
    "adapter left out": Fault(lambda f: edit_each(f / WEIGHTS, lambda weight: 0 * weight), DIFFERENT),
    "one layer missing": Fault(lambda f: edit_weights(f / WEIGHTS, lambda t: dict([*t.items()][2:])), "lacks"),
    "keys that do not match": Fault(lambda f: edit_weights(f / WEIGHTS, renamed), "(without base_model.model.)"),
    "A and B swapped": Fault(lambda f: edit_weights(f / WEIGHTS, swapped_matrices), "lora_A.weight is (8, 48), not"),
    "wrong template": Fault(
        lambda f: (f / "prompt_style.yaml").write_text("prompt_style: none\n"), "gives the prompts other tokens"
    ),
    "changed tokenizer": Fault(lambda f: edit_tokenizer(f, other_merges), "gives the prompts other tokens"),
    "second BOS": Fault(lambda f: edit_tokenizer(f, add_bos), "gives the prompts other tokens"),
}
