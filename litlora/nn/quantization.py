"""Frozen weights in another storage than a tensor's, and the linear layers that have them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from litlora.args.common import GGUF as GGUF
from litlora.errors import LitLoraError
from litlora.nn.linear import frozen_linear

DOUBLE = "bnb.nf4-dq"
NAMES = "bnb.nf4", DOUBLE


@dataclass(frozen=True)
class Quantization:
    """How the weights of the blocks are stored."""

    name: str
    """bnb.nf4, or bnb.nf4-dq where the scales are stored in 8 bits; gguf where they are as a GGUF file has them."""
    dtype: torch.dtype
    """Of the values that go in and come out."""

    @property
    def double(self) -> bool:
        return self.name == DOUBLE

    @property
    def hub(self) -> dict[str, Any]:
        """The same as the arguments of transformers' BitsAndBytesConfig, if that can make it."""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.name == GGUF:
            return {"quant_method": GGUF, "compute_dtype": dtype}
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double,
            "bnb_4bit_compute_dtype": dtype,
        }

    @classmethod
    def from_hub(cls, hub: object) -> Self:
        """Read what `hub` gives."""
        for name in (*NAMES, GGUF):
            for dtype in (torch.bfloat16, torch.float32):
                if (quantization := cls(name, dtype)).hub == hub:
                    return quantization
        raise LitLoraError(f"a base that litlora cannot make: {hub}")


class StoredWeight(nn.Module, ABC):
    """A frozen weight (out, in), stored in integers, so that casting the model leaves it unchanged."""

    shape: torch.Size
    quantization: Quantization

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def nbytes(self) -> int:
        """The bytes of its storage."""
        return sum(t.nbytes for t in (*self.parameters(), *self.buffers()))

    @abstractmethod
    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + b (T, out) for x (T, in)."""

    @abstractmethod
    def rows(self, rows: slice) -> Tensor:
        """Return some rows, dequantized."""

    def to_dense(self) -> Tensor:
        """Return the weight as a tensor (out, in)."""
        return self.rows(slice(None))


class QuantizedLinear(nn.Module):
    """A frozen linear layer with a stored weight, and its bias, if any, in the dtype of the base."""

    def __init__(self, weight: StoredWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        dtype = weight.quantization.dtype
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)


def quantization_of(model: nn.Module) -> Quantization | None:
    """Return how the weights of a model's blocks are stored, or None where they are not quantized."""
    return next((module.quantization for module in model.modules() if isinstance(module, StoredWeight)), None)
