"""A checkpoint folder of the Hub: its config.json, its weights, and the model that they make."""

import json
import re
from collections.abc import Callable, Mapping, Set
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from litlora.errors import LitLoraError
from litlora.models.checkpoint_files import CheckpointFiles, first_three
from litlora.models.config import GPTConfig
from litlora.models.families import family_of
from litlora.models.transformer import GPT
from litlora.models.weights import DIGITS, DTYPES, Weights, fingerprint, tensor_digests, unsupported_dtype
from litlora.nn.nf4 import NF4Weight
from litlora.nn.quantization import GGUF, Quantization, QuantizedLinear
from litlora.utils.console import log
from litlora.utils.progress import task, track

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DERIVED = r"\.rotary_emb\.inv_freq$"  # old Llama checkpoints store it, but it follows from the config


class Checkpoint:
    """A checkpoint folder whose config.json and safetensors headers are read and validated once."""

    def __init__(self, checkpoint_dir: Path, hub_config: dict[str, Any], config: GPTConfig, weights: Weights) -> None:
        self.dir = checkpoint_dir
        self.hub_config = hub_config
        """The content of config.json."""
        self.config = config
        self.weights = weights
        """The tensors under the Hub's names."""
        self.family, _ = family_of(hub_config)
        self._model_names: dict[str, str] = {}
        """The model's names of tensors by the checkpoint's."""

    @classmethod
    def open(cls, folder: Path | CheckpointFiles) -> Self:
        """Open a checkpoint; LitLoraError unless its weights are exactly those of its config, in name and shape."""
        files = folder if isinstance(folder, CheckpointFiles) else CheckpointFiles.find(folder)
        files, weights = open_weights(files)
        checkpoint = cls(files.dir, files.hub_config, files.config, weights)
        checkpoint._check_weights()
        if left_out := " and ".join(files.config.left_out):
            log(f"{files.dir} is multi-modal: its text model is loaded, {left_out} are left out")
        return checkpoint

    def fingerprint(self) -> str:
        """Return the hash that tells these weights from those of another base, however they are stored."""
        return sha256(json.dumps(self._digests).encode()).hexdigest()

    @property
    def tensor_digests(self) -> str:
        """A part of the hash of each tensor, in the order of their names."""
        return "".join(digest[:DIGITS] for digest in self._digests.values())

    @cached_property
    def _digests(self) -> dict[str, str]:
        stored = {name: self.weights.stored[hub_name] for hub_name, name in self._model_names.items()}
        if self.config.tie_word_embeddings:
            stored.pop(HEAD, None)  # a copy, which some files leave out
        return tensor_digests(stored)

    def difference(self, recorded: str, digests: str | None) -> str | None:
        """Tell which tensors differ from a base's with this fingerprint and these digests, or None if none does."""
        if recorded == self.fingerprint():
            return None
        if digests is None:  # as an earlier version recorded it, which hashed the files
            return None if recorded == fingerprint(self.weights.files) else "its tensors differ"
        names = list(self._digests)
        if len(digests) != DIGITS * len(names):
            return "it has other tensors"
        parts = [digests[DIGITS * n : DIGITS * (n + 1)] for n in range(len(names))]
        differing = [name for name, part in zip(names, parts, strict=True) if self._digests[name][:DIGITS] != part]
        differing = [self.hub_name(name) for name in differing]
        return f"{first_three(differing)} {'differs' if len(differing) == 1 else 'differ'}"

    @property
    def merged_dtype(self) -> torch.dtype | None:
        """The dtype in which a merged checkpoint is written, if not in that of each tensor: as config.json has it."""
        named = self.hub_config.get("dtype") or self.hub_config.get("torch_dtype")
        dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
        return dtypes.get(str(named), torch.float32) if self.weights.is_quantized else None

    @property
    def quantized_bytes(self) -> int | None:
        """The bytes of the blocks' linear layers in a file that is quantized itself."""
        if not self.weights.is_quantized:
            return None
        names = (self.hub_name(f"{name}.weight") for name in block_linears(self.outline()))
        return sum(self.weights.stored[name].nbytes for name in names)

    def outline(self) -> GPT:
        """Build the model without its weights, on the meta device."""
        with torch.device("meta"):
            return GPT(self.config)

    def load(self, dtype: torch.dtype, device: torch.device, quantization: Quantization | None = None) -> GPT:
        """Build the model with its weights, those of the blocks quantized if requested, or as a GGUF file has them.

        The weights are memory-mapped and go to the device one tensor at a time; on a CPU in the checkpoint's own dtype
        the unquantized ones are not copied at all.
        """
        model, weights = self.load_shards(dtype, device, quantization, lambda weight: weight)
        assign(model, weights)
        return model.to(device)

    def load_shards(
        self,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization | None,
        shard: Callable[[Tensor], Tensor],
    ) -> tuple[GPT, dict[str, Tensor]]:
        """Return the model without its weights, and the requested shard of each weight by name.

        The few numbers that quantization stores beside a weight's parameters are not sharded.
        """
        model = self.outline()
        if self.weights.is_quantized:
            quantization = Quantization(GGUF, dtype)
        shards = self._quantize_blocks(model, device, quantization, shard) if quantization else {}
        needed = model.state_dict().keys() - shards.keys()
        with task("loading weights", len(self.weights)) as progress:
            for path in self.weights.files:
                contents = self.weights.in_file(path)
                for hub_name, stored in contents.stored.items():
                    if (name := self._model_names.get(hub_name)) in needed:
                        # A tensor to be cast is read by a map of its own, so that its pages leave memory with it.
                        source = contents if stored.dtype is dtype else self.weights
                        shards[name] = shard(source[hub_name]).to(device, dtype)
                    progress.advance()
        return model, shards

    def _quantize_blocks(
        self, model: GPT, device: torch.device, quantization: Quantization, shard: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Replace the blocks' linear layers by quantized ones without weights, and return the shards of these."""
        shards: dict[str, Tensor] = {}
        names = block_linears(model)
        what = "reading quantized layers" if self.weights.is_quantized else f"quantizing to {quantization.name}"
        for name in track(names, what, len(names)):
            has_bias = model.get_submodule(name).bias is not None
            bias = self.tensor(f"{name}.bias").to(device) if has_bias else None
            weight = self.weights.stored_weight(self.hub_name(f"{name}.weight"), quantization.dtype, device)
            weight = weight or NF4Weight(self.tensor(f"{name}.weight").to(device), quantization)
            layer = QuantizedLinear(weight, bias)
            shards |= {f"{name}.{key}": shard(parameter.detach()) for key, parameter in layer.named_parameters()}
            shards |= {f"{name}.{key}": buffer for key, buffer in layer.named_buffers()}
            model.set_submodule(name, layer.to("meta"))
        return shards

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by the model's name, as a memory map of its own."""
        return self.weights[self.hub_name(name)]

    def read(self, name: str) -> Tensor:
        """Return a tensor by the model's name; a tied head is the embedding."""
        return self.tensor(EMBEDDING if name == HEAD and self.config.tie_word_embeddings else name)

    def hub_name(self, name: str) -> str:
        """Return the checkpoint's name of a tensor of the model, or the one that transformers would give it."""
        return self._hub_names.get(name, self.config.hub_name(name))

    @cached_property
    def _hub_names(self) -> dict[str, str]:
        return {name: hub_name for hub_name, name in self._model_names.items()}

    def module_name(self, hub_name: str) -> str:
        """Return the name that a tensor of the checkpoint has in transformers, and for PEFT."""
        return self.family.module_name(hub_name)

    def _check_weights(self) -> None:
        """Refuse weights whose names or shapes are not exactly the model's."""
        layers, stored = self.config.num_hidden_layers, self.weights.stored
        if layers > len(stored):  # before a model with this many layers is built
            self._refuse(
                f'config.json has "num_hidden_layers": {layers}, but the weights have only {len(stored)} tensors'
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in self.outline().state_dict().items()}
        by_module = {self.config.hub_name(name): name for name in shapes}
        self._check_names(by_module.keys())
        self._model_names = {
            name: by_module[module] for name in stored if (module := self.family.module_name(name)) in by_module
        }
        for hub_name, name in self._model_names.items():
            if not stored[hub_name].dtype.is_floating_point:
                raise unsupported_dtype(self.dir, hub_name, stored[hub_name].dtype)
            if stored[hub_name].shape != shapes[name]:
                actual = tuple(stored[hub_name].shape)
                self._refuse(f"{hub_name} has the shape {actual}, but config.json implies {shapes[name]}")
        self._check_tied_head()

    def _check_tied_head(self) -> None:
        tied = self.config.tie_word_embeddings and HEAD in self._hub_names
        if tied and not torch.equal(self.tensor(HEAD), self.tensor(EMBEDDING)):
            head, embedding = self.hub_name(HEAD), self.hub_name(EMBEDDING)
            self._refuse(f'config.json has "tie_word_embeddings": true, but {head} differs from {embedding}')

    def _check_names(self, expected: Set[str]) -> None:
        """Compare the names of the model's parameters in transformers with those in the files."""
        optional = {self.config.hub_name(HEAD)} if self.config.tie_word_embeddings else set()
        actual = {self.family.module_name(name): name for name in self.weights if not self.is_unused(name)}
        if missing := sorted(expected - optional - actual.keys()):
            self._refuse(f"the weights lack {first_three(missing)}")
        if surplus := sorted(actual[name] for name in actual.keys() - expected):
            self._refuse(f"the weights have {first_three(surplus)}, which the model of config.json does not have")

    def is_unused(self, hub_name: str) -> bool:
        """Tell whether the model does without a tensor that a checkpoint of its family may have."""
        patterns = filter(None, (DERIVED, self.family.unused))
        derived = any(re.search(pattern, hub_name) for pattern in patterns)
        return derived or hub_name.removeprefix("model.").startswith(tuple(f"{m}." for m in self.family.left_out))

    def _refuse(self, fault: str) -> NoReturn:
        hint = "use config.json and weights of the same model"
        source = self.weights.files[0] if self.weights.is_quantized else self.dir
        raise LitLoraError(f"{source}: {fault}; {hint}")


def open_weights(files: CheckpointFiles) -> tuple[CheckpointFiles, Weights]:
    """Read where the tensors of a checkpoint are; those of a GGUF file may untie the output head."""
    if files.gguf is None:
        return files, Weights(files.dir, files.weights)
    from litlora.models.gguf import weights  # an extra

    return weights.open_weights(files, files.gguf)


def assign(model: GPT, weights: Mapping[str, Tensor]) -> None:
    """Give a model without weights, which may have an adapter already, the weights of its base."""
    present = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    tied = model.config.tie_word_embeddings
    head = {HEAD: weights[EMBEDDING]} if tied else {}
    model.load_state_dict(present | dict(weights) | head, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight


def block_linears(model: GPT) -> list[str]:
    """Return the names of the linear layers of the blocks: all but the output head."""
    modules = model.model.layers.named_modules(prefix="model.layers")
    return [name for name, module in modules if isinstance(module, nn.Linear)]
