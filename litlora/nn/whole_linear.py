"""The product with a stored weight that is dequantized as a whole, in the forward and in the backward pass."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Dequantizable(Protocol):
    """A weight (out, in) that can become a tensor."""

    def to_dense(self) -> Tensor: ...


def whole_linear(x: Tensor, weight: Dequantizable, bias: Tensor | None) -> Tensor:
    """Return x W^T + b (T, out) for x (T, in); the dequantized weight is not saved for the backward pass."""
    out: Tensor = _WholeLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


class _WholeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Dequantizable, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.to_dense(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.weight.to_dense(), None, None
