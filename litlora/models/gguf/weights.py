"""The tensors of a GGUF file under the Hub's names: the way of the export table back."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from litlora.errors import LitLoraError
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.models.config import GPTConfig
from litlora.models.gguf.architectures import architecture_of_checkpoint
from litlora.models.gguf.comparison import differences
from litlora.models.gguf.reader import GGUFHeader, read_gguf
from litlora.models.gguf.stored import StoredInGGUF
from litlora.models.gguf.tensors import HEAD, OUTPUT, ROPE_FACTORS, TensorNames
from litlora.models.mapped_file import map_file
from litlora.models.transformer import GPT
from litlora.models.weights import Weights
from litlora.nn.gguf_weight import GGUFWeight


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

    def stored_type(self, name: str) -> str:
        """Return GGML's name of the type in which the file has a tensor."""
        stored = self.stored[name]
        assert isinstance(stored, StoredInGGUF)
        return stored.info.type.name


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
