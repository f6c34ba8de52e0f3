"""Merging an adapter into its base, file by file, into a new checkpoint."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from litlora.data.tokenizer import Tokenizer
from litlora.errors import LitLoraError
from litlora.hub.filenames import CONFIG, GENERATION_CONFIG, INDEX, LICENCES
from litlora.lora.checkpoint import read_lora_config, read_matrices, read_quantization, requires_nf4
from litlora.lora.layer import LoRALinear, add_lora, lora_layers
from litlora.models.checkpoint import EMBEDDING, HEAD, Checkpoint, block_linears
from litlora.models.transformer import GPT
from litlora.nn.nf4 import Quantization, dequantized
from litlora.utils.files import atomic_directory


def merge_adapter(adapter_dir: Path, base: Checkpoint, out_dir: Path, *, dequantized: bool) -> None:
    """Merge an adapter into its base, whose weights are dequantized first if requested, and write a checkpoint."""
    lora, model = read_lora_config(adapter_dir), base.outline()
    quantized = quantized_weights(model, adapter_dir) if dequantized else {}
    if lora.requires_quantized_base and not dequantized:
        raise LitLoraError(f"{requires_nf4(adapter_dir)}: pass --dequantized_base true")
    add_lora(model, lora)
    adapter = Adapter(model, lora_layers(model), read_matrices(model, adapter_dir, base), quantized)
    untie = model.config.tie_word_embeddings and adapter.changes(HEAD)
    with atomic_directory(out_dir) as folder:
        write_weights(folder, base, adapter, untie)
        write_config(folder, base, untie)
        copy_other_files(folder, base)


def copy_other_files(folder: Path, base: Checkpoint) -> None:
    """Copy what a checkpoint has beside its config and weights: tokenizer, generation settings and license."""
    others = (base.dir / name for name in (GENERATION_CONFIG, *LICENCES))
    for path in (*others, *Tokenizer(base.dir, base.hub_config).files):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def quantized_weights(model: GPT, adapter_dir: Path) -> dict[str, Quantization]:
    """Return which weights of the base were quantized when the adapter was trained, and how."""
    quantization = read_quantization(adapter_dir)
    if quantization is None:
        hint = "leave the flag out"
        raise LitLoraError(f"--dequantized_base: {adapter_dir} was not trained on a quantized base; {hint}")
    return {f"{name}.weight": quantization for name in block_linears(model)}


@dataclass(frozen=True)
class Adapter:
    """The layers of an adapter, which weights of its base are to be dequantized, and its tensors by PEFT's names."""

    model: GPT
    layers: dict[str, LoRALinear]
    tensors: dict[str, Tensor]
    quantized: dict[str, Quantization]

    def changes(self, weight: str) -> bool:
        return weight.removesuffix(".weight") in self.layers

    def merged(self, weight: str, base: Tensor) -> Tensor:
        """Return the base's tensor of that name, merged with the adapter's where a layer of it is adapted."""
        if weight in self.quantized:
            base = dequantized(base, self.quantized[weight])
        if not self.changes(weight):
            return base
        name = weight.removesuffix(".weight")
        layer = self.layers[name]
        hub_name = self.model.config.hub_name(name)
        own = {key: self.tensors[f"{hub_name}.{key}"] for key in layer.adapter_parameters()}
        return layer.variant.merge(base, own, layer.scaling)


def write_weights(folder: Path, base: Checkpoint, adapter: Adapter, untie: bool) -> None:
    """Write the merged weights file by file as the base has them, so that one file is in memory at a time."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for path in base.weights.files:
        tensors = {}
        for hub_name, content in base.weights.in_file(path).items():
            name = base.model_name(hub_name)
            tensors[hub_name] = content if name is None else adapter.merged(name, content)
            if untie and name == EMBEDDING and base.hub_name(HEAD) not in base.weights:
                tensors[base.hub_name(HEAD)] = adapter.merged(HEAD, content)
        save_tensors(tensors, folder / path.name)
        weight_map |= dict.fromkeys(tensors, path.name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions of the umask; save_file alone makes it the user's only."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # as which safetensors raises what the system refused
        raise LitLoraError(f"cannot write {path.name} of the merged checkpoint: {error}") from error
    path.chmod(mode)


def write_config(folder: Path, base: Checkpoint, untie: bool) -> None:
    """Write the base's config; a head that was tied to the embedding and is changed is a tensor of its own now."""
    untied = {"tie_word_embeddings": False} if untie else {}
    write_json(folder / CONFIG, base.hub_config | untied)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
