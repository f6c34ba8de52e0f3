"""Merging adapters into their base, file by file, into a new checkpoint."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from litlora.data.tokenizer import Tokenizer
from litlora.errors import LitLoraError
from litlora.hub.filenames import CONFIG, GENERATION_CONFIG, INDEX, LICENCES, TOKENIZER_FILES
from litlora.hub.filenames import WEIGHTS as MODEL_WEIGHTS
from litlora.lora.adapter import Adapter
from litlora.lora.adapter_folder import CONFIG as ADAPTER_CONFIG
from litlora.lora.adapter_folder import PROMPT_STYLE, WEIGHTS, read_prompt_style, same_style
from litlora.lora.checkpoint import read_adapters, read_quantization, refuse_compensation, shared_quantization
from litlora.lora.prompt_files import write_prompt_files
from litlora.lora.selection import Weighted
from litlora.models.checkpoint import EMBEDDING, HEAD, Checkpoint, block_linears
from litlora.nn.nf4 import Quantization, dequantized
from litlora.utils.console import log
from litlora.utils.files import atomic_directory, copy_own, refuse_foreign_link


@dataclass
class Changes:
    """How many weights a merge changes."""

    exact: int = 0
    """In float32."""
    rounded_away: int = 0
    """Which rounding to the stored dtype leaves as they were."""

    def add(self, base: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
        """Count the changes of a weight that is stored in a dtype."""
        moved = exact != base.float()
        self.exact += int(moved.sum())
        self.rounded_away += int((moved & (exact.to(dtype) == base.to(dtype))).sum())

    def __str__(self) -> str:
        share = self.rounded_away / max(self.exact, 1)
        return f"{self.rounded_away:,} of {self.exact:,} changed weights ({share:.1%}) are rounded back to the base's"


def merge_adapters(
    adapters: Sequence[Weighted],
    base: Checkpoint,
    out_dir: Path,
    *,
    dequantized: bool,
    others: Mapping[str, bytes] = MappingProxyType({}),
) -> Changes:
    """Merge adapters into their base, whose weights are dequantized first if requested, and write a checkpoint.

    `others` are the contents of files that are written into it beside. Returns how many weights the merge changes.
    """
    refuse_foreign_links(adapters, base)
    merge = read_merge(adapters, base, dequantized=dequantized)
    untie = merge.unties(base)
    with atomic_directory(out_dir) as folder:
        tokenizer = Tokenizer(base.dir, base.hub_config)
        copy_other_files(folder, base, tokenizer)
        styles = [style for adapter in adapters if (style := read_prompt_style(adapter.folder))]
        if styles and all(same_style(style, styles[0]) for style in styles):
            write_prompt_files(folder, tokenizer, styles[0])
        write_weights(folder, base, merge, untie)
        write_config(folder, base, untie)
        for name, content in others.items():
            (folder / name).write_bytes(content)
    return merge.changes


def refuse_foreign_links(adapters: Sequence[Weighted], base: Checkpoint) -> None:
    """Refuse links out of the folders of what is merged: their content would be published with the result."""
    files = [base.dir / name for name in (CONFIG, GENERATION_CONFIG, PROMPT_STYLE, *LICENCES, *TOKENIZER_FILES)]
    files += [adapter.folder / name for adapter in adapters for name in (ADAPTER_CONFIG, WEIGHTS, PROMPT_STYLE)]
    weights = [] if base.weights.is_quantized else base.weights.files  # a GGUF file is named by itself
    for path in (*files, *weights):
        refuse_foreign_link(path)


def read_merge(adapters: Sequence[Weighted], base: Checkpoint, *, dequantized: bool) -> "Merge":
    """Read adapters that are to be merged into their base, whose weights are dequantized first if requested."""
    if not dequantized:
        refuse_compensation(adapters, "pass --dequantized_base true")
    if dequantized and base.weights.is_quantized:
        fault = f"{base.weights.files[0]} is dequantized in any case"
        raise LitLoraError(f"--dequantized_base: {fault}; leave the flag out")
    quantized = quantized_weights(base, adapters) if dequantized else {}
    sources = " and ".join(str(adapter.folder) for adapter in adapters)
    merge = Merge(read_adapters(adapters, base, dequantized), quantized, sources)
    if not (dequantized or base.weights.is_quantized):
        log_other_base(adapters)
    return merge


def log_other_base(adapters: Sequence[Weighted]) -> None:
    """Say which adapters were trained on a quantized base, and are merged into one that is not."""
    for adapter in adapters:
        if quantization := read_quantization(adapter.folder):
            what = f"{adapter.folder} was trained on {quantization.name}, and is merged into the unquantized base"
            log(f"{what}: --dequantized_base true merges into the weights that it was trained on")


def copy_other_files(folder: Path, base: Checkpoint, tokenizer: Tokenizer) -> None:
    """Copy what a checkpoint has beside its config and weights: tokenizer, generation settings and license."""
    others = (base.dir / name for name in (GENERATION_CONFIG, *LICENCES))
    for path in (*others, *tokenizer.files):
        if path.is_file():
            copy_own(path, folder)


def quantized_weights(base: Checkpoint, adapters: Sequence[Weighted]) -> dict[str, Quantization]:
    """Return which weights of the base were quantized when the adapters were trained, and how."""
    quantization = shared_quantization(adapters, "merge them one by one, or leave --dequantized_base out")
    if quantization is None:
        names = " and ".join(str(adapter.folder) for adapter in adapters)
        hint = "leave the flag out"
        raise LitLoraError(f"--dequantized_base: {names} was not trained on a quantized base; {hint}")
    return {base.config.hub_name(f"{name}.weight"): quantization for name in block_linears(base.outline())}


@dataclass(frozen=True)
class Merge:
    """An adapter, and which weights of its base are to be dequantized."""

    adapter: Adapter
    quantized: Mapping[str, Quantization]
    sources: str
    """The folders of the adapter, for messages."""
    stored: torch.dtype | None = None
    """In which the merged weights will be stored, if different from that of the base."""
    changes: Changes = field(default_factory=Changes)
    """Of the weights merged so far."""

    def adapts(self, weight: str) -> bool:
        return weight.removesuffix(".weight") in self.adapter.layers

    def unties(self, base: Checkpoint) -> bool:
        """Tell whether a head that was tied to the embedding is changed, and a tensor of its own now."""
        return base.config.tie_word_embeddings and self.adapts(base.config.hub_name(HEAD))

    def in_float32(self, name: str, base: Checkpoint) -> Tensor:
        """Return a tensor by the model's name, merged in float32 and not rounded to the base's dtype."""
        return self.merged(base.config.hub_name(name), base.read(name).float())

    def merged(self, weight: str, base: Tensor) -> Tensor:
        """Return a tensor of the base, named as in transformers, merged with the adapter's where a layer is adapted."""
        name, dtype = weight.removesuffix(".weight"), base.dtype
        if weight in self.quantized:
            base = self._dequantized(name, base, self.quantized[weight])
        if not self.adapts(weight):
            return base
        exact = self.adapter.variant.merge(base.float(), self.adapter.of(name), self.adapter.layers[name].scaling)
        merged = exact.to(dtype)
        if not merged.isfinite().all():
            cause = f"lora_alpha or the adapter's weights are too large for {merged.dtype}, or not numbers themselves"
            raise LitLoraError(f"merging {self.sources} would write NaN or infinity to {weight}: {cause}")
        self.changes.add(base, exact, self.stored or dtype)
        return merged

    def _dequantized(self, layer: str, weight: Tensor, quantization: Quantization) -> Tensor:
        """Return a weight as it was in training, with what was taken out of it before it was quantized."""
        if (start := self.adapter.start_of(layer)) is None:
            return dequantized(weight, quantization)
        return dequantized(weight.to(quantization.dtype).float() - start, quantization) + start


def write_weights(folder: Path, base: Checkpoint, merge: Merge, untie: bool) -> None:
    """Write the merged weights file by file as the base has them, so that one file is in memory at a time."""
    weight_map: dict[str, str] = {}
    total_size = 0
    head, embedding = base.hub_name(HEAD), base.hub_name(EMBEDDING)
    for path in base.weights.files:
        contents = base.weights.in_file(path)
        tensors = {
            name: merge.merged(base.module_name(name), content).to(base.merged_dtype or content.dtype)
            for name, content in contents.items()
        }
        if untie and embedding in contents and head not in base.weights:
            merged = merge.merged(base.config.hub_name(HEAD), contents[embedding])
            tensors[head] = merged.to(base.merged_dtype or merged.dtype)
        file = MODEL_WEIGHTS if base.weights.is_quantized else path.name
        save_tensors(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
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
