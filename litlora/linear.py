"""The product of activations with a frozen weight, by the fastest way that the device has."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SLAB = 2048
"""Rows of a bfloat16 weight that exist in float32 at one time, where products are computed so."""


def frozen_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T (T, out) for x (T, in) and a weight (out, in) that needs no gradient."""
    if x.shape[0] == 1 and x.device.type == "cpu":
        return _row_product(x, weight)
    if has_slow_products(x):
        out: Tensor = _UpcastLinear.apply(x, weight)  # type: ignore[no-untyped-call]
        return out
    return F.linear(x, weight)


def _row_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T (1, out) for one row x (1, in) on a CPU, which takes the time to read the weight."""
    if torch.compiler.is_compiling():
        return (weight.float() * x.float()).sum(-1).to(x.dtype)[None]  # one loop: the product is never stored
    size, parts = weight.shape, _threads()
    if x.dtype is torch.bfloat16 or size[0] % parts:
        return F.linear(x, weight)
    # F.linear leaves one row to one thread.
    return torch.bmm(x.expand(parts, 1, -1), weight.view(parts, -1, size[1]).mT).view(1, -1)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _threads() -> int:
    return torch.get_num_threads()


class Linear(nn.Linear):
    """A linear layer without bias that is fast where it is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        trains = self.weight.requires_grad and torch.is_grad_enabled()
        return F.linear(x, self.weight) if trains else frozen_linear(x, self.weight)


def has_slow_products(x: Tensor) -> bool:
    """Tell whether products of this dtype and device are better computed in float32.

    Where oneDNN cannot multiply bfloat16, torch falls back to a loop that is ten times slower than float32.
    """
    return x.dtype is torch.bfloat16 and x.device.type == "cpu" and not _has_bfloat16_products()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_bfloat16_products() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _UpcastLinear(torch.autograd.Function):
    """A bfloat16 product computed in float32, where it is exact but for the order of its sums, and rounded once.

    The weight is cast slab by slab, again for the gradient: its float32 copy never leaves the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        out, wide = x.new_empty(len(x), len(weight)), x.float()
        for rows in _slabs(weight):
            out[:, rows] = F.linear(wide, weight[rows].float())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        total = gradient.new_zeros(len(gradient), weight.shape[1], dtype=torch.float32)
        for rows in _slabs(weight):
            total.addmm_(gradient[:, rows].float(), weight[rows].float())
        return total.to(gradient.dtype), None


def _slabs(weight: Tensor) -> Iterator[slice]:
    return (slice(start, start + SLAB) for start in range(0, len(weight), SLAB))
