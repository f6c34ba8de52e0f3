"""The low-rank product of an adapter, with an autograd function that saves no more than it needs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from litlora.nn.backend import without_autocast
from litlora.nn.dropout import Dropout, masked


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: Dropout) -> Tensor:
    """Add scaling · B A dropout(x) to y (T, out) in place, and return it; x is (T, in), A (r, in) and B (out, r)."""
    if not dropout.dropped and not torch.is_grad_enabled():
        return _add(y, x, a, b, scaling, None)[0]
    out: Tensor = _AddLowRank.apply(y, x, a, b, scaling, dropout)  # type: ignore[no-untyped-call]
    return out


def _add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, factor: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add factor · B A x to y in place, for x under a dropout mask; return it and the (T, r) product with A."""
    with without_autocast(x):
        low = F.linear(masked(x, mask).to(a.dtype), a).mul_(factor)
        # A bfloat16 sum is rounded once, and stays bfloat16.
        return (y.addmm_(low, b.t()) if y.dtype == b.dtype else y.add_(F.linear(low, b))), low


class _AddLowRank(torch.autograd.Function):
    """Add scaling · B A dropout(x) to y (T, out), in place.

    Of x (T, in) only x itself is saved, which the other layers with this input save as well, and the dropout's seed.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: Dropout) -> Tensor:
        ctx.dropout, ctx.scaling = dropout, scaling
        out, low = _add(y, x, a, b, scaling * dropout.factor, dropout.mask(x))
        ctx.save_for_backward(x, a, b, low)
        ctx.mark_dirty(y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low = ctx.saved_tensors
        gradient, mask = y_gradient.to(b.dtype), ctx.dropout.mask(x)
        # Both factors of a product with few columns are contiguous along their rows: a third of the time on CPU.
        low_gradient = F.linear(gradient, b.t().contiguous()).mul_(ctx.scaling * ctx.dropout.factor)
        a_gradient = low_gradient.t() @ masked(x, mask).to(a.dtype)
        x_gradient = masked((low_gradient @ a).to(x.dtype), mask) if ctx.needs_input_grad[1] else None
        return y_gradient, x_gradient, a_gradient, (low.t() @ gradient).t(), None, None
