"""The tensors of a GGUF file: llama.cpp's names, and the order in which it has the rows of queries and keys."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from litlora.errors import LitLoraError
from litlora.models.config import GPTConfig
from litlora.models.gguf.architectures import Architecture
from litlora.models.gguf.library import gguf
from litlora.models.gguf.rebuilt.rope import LLAMA_3_DIVISORS, LONGROPE_DIVISORS
from litlora.models.rope_config import Llama3Scaling, LongRopeScaling
from litlora.models.rope_scaling import llama3_frequencies

EMBEDDING, HEAD, OUTPUT = "model.embed_tokens.weight", "lm_head.weight", "output.weight"
ARCHITECTURES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
ROPE_FACTORS = LLAMA_3_DIVISORS, *LONGROPE_DIVISORS.values()


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file: its content is computed when it is written, so that one is in memory at a time."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class TensorNames:
    """llama.cpp's name of each tensor of a model, and what is done to its rows."""

    def __init__(self, own: Architecture, config: GPTConfig) -> None:
        self.own, self.config = own, config
        self._map = gguf.TensorNameMap(ARCHITECTURES[own.name], config.num_hidden_layers)

    def of(self, name: str) -> str:
        """Return llama.cpp's name of a tensor, given the model's."""
        hub_name = self.config.hub_name(name).replace("model.language_model.", "model.")
        found = self._map.get_name(hub_name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise LitLoraError(f"llama.cpp's {self.own.name} has no {hub_name}: use another format")
        return str(found)

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor (out, ...) of a layer, or the B of its adapter, with its rows in llama.cpp's order."""
        config, layer = self.config, name.split(".")[-2]
        if layer == "qkv_proj" and config.fused_qkv == "heads":
            by_head = tensor.reshape(config.num_attention_heads, 3, config.head_dim, *tensor.shape[1:])
            return by_head.transpose(0, 1).reshape(tensor.shape)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer)
        halves = self.own.interleaved and not any(rope.interleaved for rope in config.distinct_ropes)
        if heads is None or not halves:
            return tensor
        pairs = tensor.reshape(heads, 2, config.head_dim // 2, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)

    def order(self, name: str, rows: int) -> Tensor | None:
        """Return which of llama.cpp's rows is each of a tensor's, or None where they have the same order."""
        own = torch.arange(rows)
        theirs = self.rows(name, own)
        return None if theirs is own else theirs.argsort()

    def offset(self, name: str, shape: Sequence[int]) -> float:
        """Return what llama.cpp has added to a tensor."""
        return float(len(shape) == 1 and self.config.norm == "rms_plus_one" and "norm" in name)

    def content(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the model as llama.cpp has it."""
        if offset := self.offset(name, tensor.shape):
            return tensor.float() + offset
        return self.rows(name, tensor)

    def stack(self, name: str) -> str | None:
        """Return the name of the stack of which a tensor is a part: norms of each head are one tensor in llama.cpp."""
        is_part = self.config.qk_norm == "each_head" and "_norm.norms." in name
        return f"{name.partition('.norms.')[0]}.weight" if is_part else None


def model_tensors(
    own: Architecture, config: GPTConfig, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]
) -> Iterator[GGUFTensor]:
    """Yield the tensors of a model, given its shapes and what reads a tensor, both by the model's names."""
    names = TensorNames(own, config)
    has_own_head = own.own_head or not config.tie_word_embeddings
    stacked: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        if stack := names.stack(name):
            stacked.setdefault(stack, []).append(name)
        elif name != HEAD or has_own_head:
            yield GGUFTensor(names.of(name), shape, partial(_content, names, read, name))
    for name, parts in stacked.items():
        shape = (len(parts), *shapes[parts[0]])
        yield GGUFTensor(names.of(name), shape, partial(_stacked, read, parts))
    yield from rope_factors(config)


def _content(names: TensorNames, read: Callable[[str], Tensor], name: str) -> Tensor:
    return names.content(name, read(name))


def _stacked(read: Callable[[str], Tensor], parts: Sequence[str]) -> Tensor:
    return torch.stack([read(part) for part in parts])


def rope_factors(config: GPTConfig) -> Iterator[GGUFTensor]:
    """Yield the divisors of the rotary frequencies where the metadata cannot say them."""
    freqs, long, short = ROPE_FACTORS
    for rope in config.distinct_ropes:
        match rope.scaling:
            case Llama3Scaling():
                plain = 1 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
                divisors = plain / llama3_frequencies(plain, rope.scaling)
                yield GGUFTensor(freqs, tuple(divisors.shape), divisors.clone)
            case LongRopeScaling():
                for name, factors in (long, rope.scaling.long_factor), (short, rope.scaling.short_factor):
                    yield GGUFTensor(name, (len(factors),), partial(torch.tensor, factors))
