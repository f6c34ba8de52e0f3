"""The tensors of a GGUF file under the Hub's names: the way of the export table back."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.errors import LitLoraError
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.models.config import GPTConfig
from litlora.models.gguf.architectures import Architecture, architecture_of_checkpoint, name_of
from litlora.models.gguf.library import gguf
from litlora.models.gguf.metadata import add_computation
from litlora.models.gguf.reader import GGUFHeader, TensorInfo, read_gguf
from litlora.models.gguf.tensors import HEAD, OUTPUT, ROPE_FACTORS, TensorNames, rope_factors
from litlora.models.transformer import GPT
from litlora.models.weights import Weights, map_file
from litlora.nn.gguf_weight import GGUFWeight, dequantize

SCALING, NO_SCALING = "rope.scaling.type", "none"
NOT_COMPARED = "vocab_size", "sliding_window_pattern"
"""Keys whose meaning is in the shapes already, or that converters write in different forms."""
CLOSE = 1e-4
"""Relative difference up to which two numbers are one that was stored in float32."""


@dataclass(frozen=True)
class StoredInGGUF:
    """A tensor of the model in a GGUF file."""

    path: Path
    info: TensorInfo
    shape: torch.Size
    """Of the tensor in the model, which may be one part of that in the file."""
    part: int | None = None
    order: Tensor | None = None
    """Which of the file's rows is each of the model's."""
    offset: float = 0.0
    """What the file has added to it."""
    dtype: torch.dtype = torch.float32

    @property
    def start(self) -> int:
        """The first byte in the file."""
        return self.info.start

    @property
    def nbytes(self) -> int:
        """The bytes in the file."""
        return self.info.nbytes

    def packed(self, content: Tensor) -> Tensor:
        """Return the bytes of each row (rows, bytes) in the model's order, of the content of the file (bytes,)."""
        raw = content[self.info.start :][: self.info.nbytes].view(-1, self.info.type.row_bytes(self.info.shape[-1]))
        raw = raw if self.part is None else raw[self.part : self.part + 1]
        return raw if self.order is None or len(raw) == 1 else raw[self.order]

    def view(self, content: Tensor) -> Tensor:
        """Return the tensor dequantized."""
        packed, kind = self.packed(content), self.info.type
        values = dequantize(packed, kind, torch.empty(len(packed), packed.shape[1] // kind.nbytes * kind.values))
        values = values.view(self.shape)
        if self.order is not None and values.dim() == 1:
            values = values[self.order]
        return values - self.offset if self.offset else values


class GGUFWeights(Weights):
    """The tensors of a GGUF file, dequantized where they are read."""

    is_quantized = True

    def __init__(self, path: Path, stored: Mapping[str, StoredInGGUF]) -> None:
        self.files, self.stored = [path], dict(stored)

    def stored_weight(self, name: str, dtype: torch.dtype, device: torch.device) -> GGUFWeight:
        """Return a tensor as a frozen weight that stays as it is in the file."""
        stored = self.stored[name]
        assert isinstance(stored, StoredInGGUF)
        return GGUFWeight(stored.packed(map_file(stored.path)).to(device), stored.info.type, dtype)


def open_weights(files: CheckpointFiles, path: Path) -> tuple[CheckpointFiles, GGUFWeights]:
    """Read where a file has the tensors of a checkpoint's model, which must be the same network.

    Where the file has an output head, the model has one of its own: quantized, it may differ from a tied embedding.
    """
    header, config = read_gguf(path).require_trainable(), files.config
    fault = next(differences(header, files.hub_config, config), None)
    names = TensorNames(architecture_of_checkpoint(files.hub_config, config), config)
    if fault is not None:
        hint = "name the GGUF file and the checkpoint folder of the same model"
        raise LitLoraError(f"{path} does not hold the model of {files.dir / 'config.json'}: {fault}; {hint}")
    if config.tie_word_embeddings and OUTPUT in header.tensors:
        hub_config = files.hub_config | {"tie_word_embeddings": False}
        files = replace(files, hub_config=hub_config, config=replace(config, tie_word_embeddings=False))
    return files, GGUFWeights(path, dict(_stored(header, names, files.config)))


def differences(header: GGUFHeader, hub_config: Mapping[str, Any], config: GPTConfig) -> Iterator[str]:
    """Yield in what a file's metadata is of another model than that of a config.json."""
    own = architecture_of_checkpoint(hub_config, config)
    if (expected := name_of(own)) != header.architecture:
        yield f"it is for llama.cpp's {header.architecture}, not {expected}"
        return
    yield from _different_keys(header, own, config)
    yield from _different_factors(header, config)


def _stored(header: GGUFHeader, names: TensorNames, config: GPTConfig) -> Iterator[tuple[str, StoredInGGUF]]:
    """Yield the model's tensors that the file has, and by their own names those that the model does not have."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    used = set(ROPE_FACTORS)
    for name, shape in shapes.items():
        if name == HEAD and config.tie_word_embeddings:
            continue
        stack = names.stack(name)
        theirs = names.of(stack or name)
        used.add(theirs)
        if (info := header.tensors.get(theirs)) is None:
            continue
        part = int(name.split(".")[-2]) if stack else None
        fits = info.shape[1:] == shape if stack else info.shape == shape
        own = shape if fits else torch.Size(info.shape)  # which is then refused with both shapes
        order = names.order(name, shape[0]) if fits and stack is None else None
        yield config.hub_name(name), StoredInGGUF(header.path, info, own, part, order, names.offset(name, shape))
    for name, info in header.tensors.items():
        if name not in used:
            yield name, StoredInGGUF(header.path, info, torch.Size(info.shape))


def _different_keys(header: GGUFHeader, own: Architecture, config: GPTConfig) -> Iterator[str]:
    """Yield how the file's metadata differs from that which the config would be exported with."""
    writer, arch = gguf.GGUFWriter(None, name_of(own)), header.architecture
    add_computation(writer, own, config)
    expected: dict[str, Any] = {key: value.value for key, value in writer.kv_data[0].items()}
    scaling = f"{arch}.{SCALING}"
    for key in dict.fromkeys([*expected, scaling]):
        absent = NO_SCALING if key == scaling else None
        theirs, ours = header.metadata.get(key, absent), expected.get(key, absent)
        compared = key.removeprefix(f"{arch}.") not in NOT_COMPARED and key.startswith(f"{arch}.")
        if compared and theirs is not None and not _agree(theirs, ours):
            yield f"its {key} is {theirs}, and config.json implies {ours}"


def _agree(one: Any, other: Any) -> bool:
    """Tell whether two values are the same; a list is as good as its one value."""
    if isinstance(one, list):
        return all(_agree(each, other) for each in one) if not isinstance(other, list) else one == other
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return math.isclose(one, other, rel_tol=CLOSE) if numbers else one == other


def _different_factors(header: GGUFHeader, config: GPTConfig) -> Iterator[str]:
    """Yield the factors of rotary frequencies that differ from the config's."""
    expected = {tensor.name: tensor.read() for tensor in rope_factors(config)}
    content = map_file(header.path)
    for name in ROPE_FACTORS:
        info = header.tensors.get(name)
        ours = expected.get(name)
        if info is None and ours is None:
            continue
        if info is None or ours is None or info.shape != tuple(ours.shape):
            yield f"{name} is in {'config.json' if info is None else 'it'} alone, or has another shape"
            continue
        theirs = StoredInGGUF(header.path, info, ours.shape).view(content)
        if not torch.allclose(theirs, ours, rtol=CLOSE):
            yield f"its {name} differs from the rope_scaling of config.json"
