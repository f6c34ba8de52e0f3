"""The product of activations with a frozen weight, by the fastest way that the device has."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def frozen_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T (T, out) for x (T, in) and a weight (out, in) that needs no gradient."""
    if has_slow_products(x) and len(x) > 1:  # a single row is bound by memory, and a cast would move more of it
        out: Tensor = _UpcastLinear.apply(x, weight)  # type: ignore[no-untyped-call]
        return out
    return F.linear(x, weight)


class Linear(nn.Linear):
    """A linear layer without bias that is fast where it is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if self.weight.requires_grad else frozen_linear(x, self.weight)


def has_slow_products(x: Tensor) -> bool:
    """Tell whether products of this dtype and device are better computed in float32.

    Where oneDNN cannot multiply bfloat16, torch falls back to a loop that is ten times slower than float32.
    """
    return x.dtype is torch.bfloat16 and x.device.type == "cpu" and not _has_bfloat16_products()


@cache
def _has_bfloat16_products() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _UpcastLinear(torch.autograd.Function):
    """A bfloat16 product computed in float32, where it is exact but for the order of its sums, and rounded once.

    The backward pass casts the weight again: a float32 copy lives no longer than one product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return (gradient.float() @ weight.float()).to(gradient.dtype), None
