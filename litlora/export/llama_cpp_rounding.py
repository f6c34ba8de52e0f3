"""What llama.cpp rounds of a network, computed by litlora: the weights of a GGUF file, and the inputs of products."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from litlora.export.gguf.types import stored_type
from litlora.lora.layer import LoRALinear
from litlora.nn.gguf_rounding import rounded, rounded_input
from litlora.nn.gguf_weight import GGUFWeight
from litlora.nn.linear import Linear
from litlora.nn.quantization import QuantizedLinear, StoredWeight

Layer = LoRALinear | Linear | QuantizedLinear


class LlamaCppRounding:
    """Has the linear layers of a module compute as llama.cpp does, while the module computes."""

    def apply(self, part: nn.Module, _: int) -> None:
        """Replace what the layers of a block, the embedding or the output head compute."""
        for module in part.modules():
            if isinstance(module, Layer):
                module.__dict__["forward"] = self.product(module, is_end=module is part)
            elif isinstance(module, nn.Embedding):
                module.weight.data = self.embedding(module.weight.data)

    def undo(self, part: nn.Module) -> None:
        """Have the layers compute as before."""
        for module in part.modules():
            if isinstance(module, Layer):
                module.__dict__.pop("forward", None)

    def product(self, layer: Layer, *, is_end: bool) -> Callable[[Tensor], Tensor]:
        """Return what computes the output of a layer for an input (T, in)."""
        raise NotImplementedError

    def embedding(self, weight: Tensor) -> Tensor:
        """Return the embedding as it is stored."""
        raise NotImplementedError


@dataclass(frozen=True)
class Exported(LlamaCppRounding):
    """The file that `export` writes with an --outtype, the adapter merged."""

    outtype: str

    def product(self, layer: Layer, *, is_end: bool) -> Callable[[Tensor], Tensor]:
        weight = _merged(layer)
        kind = stored_type(weight.shape, self.outtype, is_end=is_end)
        return partial(_rounded_product, weight=rounded(weight, kind), bias=_float(layer.bias), kind=kind)

    def embedding(self, weight: Tensor) -> Tensor:
        return rounded(weight, stored_type(weight.shape, self.outtype, is_end=True))


@dataclass(frozen=True)
class AsTrained(LlamaCppRounding):
    """The GGUF file over which an adapter was trained, and the adapter beside it."""

    head: str
    """The type of the output head in the file."""

    def product(self, layer: Layer, *, is_end: bool) -> Callable[[Tensor], Tensor]:
        weight = _dense(layer.weight)
        kind = layer.weight.kind.name if isinstance(layer.weight, GGUFWeight) else self.head if is_end else "F32"
        base = partial(_rounded_product, weight=weight, bias=_float(layer.bias), kind=kind)
        return partial(_completed, layer, base) if isinstance(layer, LoRALinear) else base

    def embedding(self, weight: Tensor) -> Tensor:
        return weight


def _rounded_product(x: Tensor, *, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return F.linear(rounded_input(x, kind), weight, bias)


def _completed(layer: LoRALinear, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return layer.completed(base(x), x)


def _merged(layer: Layer) -> Tensor:
    weight = _dense(layer.weight)
    if not isinstance(layer, LoRALinear):
        return weight
    return layer.variant.merge(weight, layer.adapter_parameters(), layer.scaling)


def _dense(weight: Any) -> Tensor:
    dense: Tensor = weight.to_dense() if isinstance(weight, StoredWeight) else weight.data
    return dense.float()


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
