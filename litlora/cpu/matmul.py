"""Products of activations with a frozen weight on CPU."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from litlora.cpu.onednn import has_slow_products, matmul_dtype
from litlora.cpu.tuning import (
    COMPILED_SUMS,
    LONG_OUTPUTS,
    LONG_SLICE,
    SLICE_ROWS,
    STORED_SLICE_ROWS,
    STORED_SLICE_VALUES,
)


class StoredWeight(Protocol):
    """A weight (out, in) in another storage than a tensor's, which is read some rows at a time."""

    shape: torch.Size

    def rows(self, rows: slice, /) -> Tensor: ...


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b (T, out) for x (T, in), and a frozen weight (out, in) and bias (out,)."""
    if len(x) == 1 and torch.compiler.is_compiling():
        return _compiled_linear(x, weight, bias)
    if weight.itemsize < x.itemsize or (len(x) > 1 and has_slow_products(x.dtype)):
        return sliced_linear(x, weight, bias)
    if len(x) > 1 and _is_long(weight, x):
        out: Tensor = _LongLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return F.linear(x, weight, bias)


def sliced_linear(x: Tensor, weight: Tensor | StoredWeight, bias: Tensor | None) -> Tensor:
    """Return x W^T + b (T, out) for a frozen weight (out, in) that is cast or dequantized some rows at a time."""
    out: Tensor = _SlicedLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def add_bias(product: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias (out,), if any, to a product (T, out) in place."""
    return product if bias is None else product.add_(bias)


def _compiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b (1, out) for one row x (1, in), by loops that a compiler can fuse."""
    row = x.float()
    # One loop that stores no product, and that does not wait for one sum while it adds to another.
    parts = [(part.float() * row).sum(-1) for part in weight.chunk(COMPILED_SUMS)]
    return add_bias(torch.cat(parts), bias).to(x.dtype)[None]


def _is_long(weight: Tensor, x: Tensor) -> bool:
    """Tell whether a product is so large that oneDNN's copy of the whole weight matters."""
    if torch.is_autocast_enabled("cpu"):  # in which torch's own products are in bfloat16
        return False
    return len(weight) >= LONG_OUTPUTS and weight.dtype is x.dtype is torch.float32


class _SlicedLinear(torch.autograd.Function):
    """A product with a weight that is cast or dequantized in slices of rows, again in the backward pass.

    A slice never leaves the cache. Where bfloat16 products are slow they are computed in float32, in which they are
    exact up to the order of their sums, and rounded once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | StoredWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        out, inputs = x.new_empty(len(x), weight.shape[0]), x.to(matmul_dtype(x.dtype))
        for rows in _slices(weight, x):
            part = None if bias is None else bias[rows].to(inputs.dtype)
            _write_product(inputs, _rows(weight, rows).to(inputs.dtype), part, out[:, rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        assert not any(ctx.needs_input_grad[1:]), "the weight and the bias get no gradient here"
        dtype, slices = matmul_dtype(gradient.dtype), _slices(ctx.weight, gradient)
        parts = (gradient[:, rows].to(dtype) @ _rows(ctx.weight, rows).to(dtype) for rows in slices)
        total = next(parts)
        for part in parts:
            total = total.float().add_(part)  # a sum in bfloat16 would be rounded once for each slice
        return total.to(gradient.dtype), None, None


class _LongLinear(_SlicedLinear):
    """A product with many outputs, in slices: oneDNN copies no whole weight. Its gradient is one product."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        assert not any(ctx.needs_input_grad[1:]), "the weight and the bias get no gradient here"
        return gradient @ ctx.weight, None, None


def _write_product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write x W^T + b to `out`: rounded if that has another dtype, else without a copy."""
    if out.dtype is not x.dtype:
        out.copy_(F.linear(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _rows(weight: Tensor | StoredWeight, rows: slice) -> Tensor:
    return weight[rows] if isinstance(weight, Tensor) else weight.rows(rows)


def _slices(weight: Tensor | StoredWeight, x: Tensor) -> Iterator[slice]:
    rows, width = weight.shape
    if isinstance(weight, Tensor):
        size = LONG_SLICE if _is_long(weight, x) else SLICE_ROWS
    elif has_slow_products(x.dtype):
        size = STORED_SLICE_ROWS
    else:  # a multiple, so that a slice ends with a block of the quantization
        size = STORED_SLICE_ROWS * max(1, STORED_SLICE_VALUES // (STORED_SLICE_ROWS * width))
    return (slice(start, start + size) for start in range(0, rows, size))
