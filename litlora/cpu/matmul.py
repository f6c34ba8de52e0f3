"""Products of activations with a frozen weight."""

from collections.abc import Iterator
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from litlora.cpu.onednn import arithmetic, has_slow_products
from litlora.cpu.weight_layouts import HalfWeight, is_packed

SLAB = 2048
"""Rows of a bfloat16 weight that exist in float32 at one time, where products are computed so."""
STORED_SLAB = 512
"""Rows of a stored weight that exist as numbers at one time on a CPU: fewer, since each is there in several dtypes."""
STORED_VALUES = 2**20
"""Values that more rows than these may have where each is there in one dtype: fewer products take less time."""

LONG, PART = 2**14, 512
"""Outputs of a float32 product that a CPU computes in parts, at the least, and of a part, which stays in the cache."""

SUMS = 4
"""Outputs of a compiled product that are summed side by side: a processor begins one sum before another is done."""


class StoredWeight(Protocol):
    """A weight (out, in) that is stored otherwise than it is computed with, and read some rows at a time."""

    shape: torch.Size

    def __getitem__(self, rows: slice, /) -> Tensor: ...

    def times_row(self, x: Tensor) -> Tensor:
        """Return x W^T for a single row x (1, in) on a GPU, without gradients."""


def frozen_linear(x: Tensor, weight: Tensor | StoredWeight | HalfWeight, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b (T, out) for x (T, in), and a weight (out, in) and bias (out,) that need no gradient."""
    if isinstance(weight, HalfWeight):
        return _add_bias(weight.product(x), bias)
    one_row = x.shape[0] == 1
    if not isinstance(weight, Tensor):
        if one_row and x.is_cuda and not torch.is_grad_enabled():
            return _add_bias(weight.times_row(x), bias)
    elif is_packed(weight):
        return _add_bias(_striped_row_product(x, weight) if one_row else _striped_product(x, weight), bias)
    elif one_row and x.device.type == "cpu" and (torch.compiler.is_compiling() or not _is_narrow(weight, x)):
        return _row_product(x, weight, bias)
    elif not (has_slow_products(x.dtype, x.device) or _is_narrow(weight, x)):
        return _long_product(x, weight, bias) if _is_long(weight, x) else F.linear(x, weight, bias)
    out: Tensor = _SlabLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def _add_bias(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product.add_(bias)


def _long_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b (T, out), computed some outputs at a time."""
    out: Tensor = _LongLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def _row_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b (1, out) for one row x (1, in) on a CPU, in the time that it takes to read the weight."""
    if torch.compiler.is_compiling():
        row = x.float()
        # One loop that stores no product, and that does not wait for one sum while it adds to another.
        parts = [(part.float() * row).sum(-1) for part in weight.chunk(SUMS)]
        return _add_bias(torch.cat(parts), bias).to(x.dtype)[None]
    size, threads = weight.shape, torch.get_num_threads()
    if x.dtype is torch.bfloat16 or size[0] % threads:
        return F.linear(x, weight, bias)
    # F.linear leaves one row to one thread.
    product = torch.bmm(x.expand(threads, 1, -1), weight.view(threads, -1, size[1]).mT).view(1, -1)
    return _add_bias(product, bias)


def _is_long(weight: Tensor, x: Tensor) -> bool:
    """Tell whether a product's rows lie so far apart that a CPU had better not write to all of them at a time."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):  # which has torch's own products in bfloat16
        return False
    return len(weight) >= LONG and weight.dtype is x.dtype is torch.float32


def _is_narrow(weight: Tensor, x: Tensor) -> bool:
    """Tell whether a weight is in fewer bits than what is computed with it."""
    return weight.itemsize < x.itemsize


def _striped_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T (T, out) for a weight in stripes."""
    return torch.bmm(x.expand(len(weight), -1, -1), weight).transpose(0, 1).reshape(len(x), -1)


def _striped_row_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T (1, out) for one row and a weight in stripes: a stripe's outputs are a weighted sum of its rows.

    To torch that is a bag of embeddings, which it reads nearly as fast as the memory can be read, and adds in float32.
    """
    stripes, size, width = weight.shape
    rows, starts = _bags(stripes, size)
    factors = x.expand(stripes, -1).reshape(-1)
    out, *_ = torch.embedding_bag(weight.view(-1, width), rows, starts, False, 0, False, factors, True)
    return out.view(1, -1)


@cache
def _bags(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the rows of so many bags, of which each has the next so many, and where each begins and the last ends."""
    rows = torch.arange(count * size + 1, dtype=torch.int32)
    return rows[:-1], rows[::size]


class _SlabLinear(torch.autograd.Function):
    """A product with a weight that is cast or dequantized slab by slab, again for the gradient: nothing of it is kept.

    On a CPU a slab never leaves the cache. Where bfloat16 products are slow they are computed in float32, in which
    they are exact but for the order of their sums, and rounded once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        out, wide = x.new_empty(len(x), weight.shape[0]), x.to(arithmetic(x.dtype, x.device))
        for rows in _slabs(weight, x):
            part = None if bias is None else bias[rows].to(wide.dtype)
            _product(wide, weight[rows].to(wide.dtype), part, out[:, rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        assert not any(ctx.needs_input_grad[1:]), "the weight and the bias get no gradient here"
        dtype, slabs = arithmetic(gradient.dtype, gradient.device), _slabs(ctx.weight, gradient)
        parts = (gradient[:, rows].to(dtype) @ ctx.weight[rows].to(dtype) for rows in slabs)
        total = next(parts)
        for part in parts:
            total = total.float().add_(part)  # a sum in bfloat16 would be rounded once for each slab
        return total.to(gradient.dtype), None, None


class _LongLinear(_SlabLinear):
    """A product with long rows, which is computed in slabs; its gradient has short ones, and is one product."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        assert not any(ctx.needs_input_grad[1:]), "the weight and the bias get no gradient here"
        return gradient @ ctx.weight, None, None


def _product(x: Tensor, slab: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write x W^T + b to `out`, rounded if that has another dtype; else nothing lies in memory twice."""
    if out.dtype is not x.dtype:
        out.copy_(F.linear(x, slab, bias))
    elif bias is None:
        torch.mm(x, slab.t(), out=out)
    else:
        torch.addmm(bias, x, slab.t(), out=out)


def _slabs(weight: StoredWeight, x: Tensor) -> Iterator[slice]:
    rows, width = weight.shape
    if x.device.type != "cpu":
        size = rows
    elif isinstance(weight, Tensor):
        size = PART if _is_long(weight, x) else SLAB
    elif has_slow_products(x.dtype, x.device):
        size = STORED_SLAB
    else:
        size = STORED_SLAB * max(1, STORED_VALUES // (STORED_SLAB * width))  # a multiple, with which a block ends
    return (slice(start, start + size) for start in range(0, rows, size))
