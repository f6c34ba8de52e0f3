"""The product of activations with a frozen weight, by the fastest way that the device has."""

from collections.abc import Iterator, Sequence
from functools import cache
from math import frexp, inf
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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

STRIPE, NARROWEST = 384, 32
"""Bytes of a packed weight, at most, and outputs, at least, that lie next to each other."""

HALF_EXPONENT = 16
"""Of the power of two that the largest number of a weight in float16 is below, as all of float16 are."""

ASKED = 64
"""Rows of a weight of which it is asked at one time whether a dtype holds their numbers: they stay in the cache."""
PACKED = 2**14
"""Rows that FBGEMM packs at one time: where there are very many, each takes it several times as long."""

TINY = 1e-30
"""A largest number of which the powers of two that bring it up there are still float32's."""

HAS_BFLOAT16_PRODUCTS: bool = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
"""Whether oneDNN can multiply bfloat16 on this CPU: a constant, which torch's compiler need not trace."""

HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
"""Whether torch has the library that multiplies a row by a packed weight."""


class StoredWeight(Protocol):
    """A weight (out, in) that is stored otherwise than it is computed with, and read some rows at a time."""

    shape: torch.Size

    def __getitem__(self, rows: slice, /) -> Tensor: ...

    def times_row(self, x: Tensor) -> Tensor:
        """Return x W^T for a single row x (1, in) on a GPU, without gradients."""


class HalfWeight:
    """A CPU's float32 weight (out, in), packed in float16, which holds its numbers as they are.

    They are stored times a power of two, so that the largest is near the largest that float16 has: below it, numbers of
    bfloat16's 8 bits may be smaller by 32 powers of two. Products are float32, and take about the time to read them.
    """

    def __init__(self, parts: Sequence[Any], factor: float) -> None:
        self.parts, self.factor = parts, torch.tensor(factor)  # a number would be made a tensor for each product

    @classmethod
    def holding(cls, weight: Tensor) -> Self | None:
        """Return a weight in float16, or None where one of its numbers would be rounded."""
        least, most = (value.item() for value in torch.aminmax(weight))
        largest = max(-least, most)
        if not TINY < largest < inf:
            return None
        factor = 2.0 ** (frexp(largest)[1] - HALF_EXPONENT)
        if not _holds(torch.float16, weight, factor):
            return None
        pack = torch.ops.quantized.linear_prepack_fp16
        return cls([pack(rows / factor, None) for rows in torch.split(weight, PACKED)], factor)

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T (T, out) for x (T, in), without gradients."""
        products = [torch.ops.quantized.linear_dynamic_fp16(x, part) for part in self.parts]
        out = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        return out.mul_(self.factor)


def frozen_linear(x: Tensor, weight: Tensor | StoredWeight | HalfWeight) -> Tensor:
    """Return x W^T (T, out) for x (T, in) and a weight (out, in) that needs no gradient."""
    if isinstance(weight, HalfWeight):
        return weight.product(x)
    one_row = x.shape[0] == 1
    if not isinstance(weight, Tensor):
        if one_row and x.is_cuda and not torch.is_grad_enabled():
            return weight.times_row(x)
    elif is_packed(weight):
        return _striped_row_product(x, weight) if one_row else _striped_product(x, weight)
    elif one_row and x.device.type == "cpu" and (torch.compiler.is_compiling() or not _is_narrow(weight, x)):
        return _row_product(x, weight)
    elif not (has_slow_products(x.dtype, x.device) or _is_narrow(weight, x)):
        return _long_product(x, weight) if _is_long(weight, x) else F.linear(x, weight)
    out: Tensor = _SlabLinear.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


def _long_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T (T, out), computed some outputs at a time."""
    out: Tensor = _LongLinear.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


def _row_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T (1, out) for one row x (1, in) on a CPU, which takes the time to read the weight."""
    if torch.compiler.is_compiling():
        row = x.float()
        # One loop that stores no product, and that does not wait for one sum while it adds to another.
        parts = [(part.float() * row).sum(-1) for part in weight.chunk(SUMS)]
        return torch.cat(parts).to(x.dtype)[None]
    size, threads = weight.shape, torch.get_num_threads()
    if x.dtype is torch.bfloat16 or size[0] % threads:
        return F.linear(x, weight)
    # F.linear leaves one row to one thread.
    return torch.bmm(x.expand(threads, 1, -1), weight.view(threads, -1, size[1]).mT).view(1, -1)


def _is_long(weight: Tensor, x: Tensor) -> bool:
    """Tell whether a product's rows lie so far apart that a CPU had better not write to all of them at a time."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):  # which has torch's own products in bfloat16
        return False
    return len(weight) >= LONG and weight.dtype is x.dtype is torch.float32


def narrowed(weight: Tensor) -> Tensor:
    """Return a CPU's float32 weight in bfloat16 if that holds its numbers as they are, for `frozen_linear` alone.

    So it is with most checkpoints. One row is then multiplied in half the time, which is that to read the weight, and
    in float32 all the same.
    """
    if weight.device.type != "cpu" or weight.dtype is not torch.float32 or not _holds(torch.bfloat16, weight):
        return weight
    return weight.bfloat16()


def _holds(dtype: torch.dtype, weight: Tensor, factor: float = 1.0) -> bool:
    """Tell whether a dtype holds all numbers of a weight, divided by a power of two, as they are."""
    parts = (rows / factor for rows in torch.split(weight, ASKED))
    return all(torch.equal(part.to(dtype).to(weight.dtype), part) for part in parts)


def _is_narrow(weight: Tensor, x: Tensor) -> bool:
    """Tell whether a weight is in fewer bits than what is computed with it."""
    return weight.itemsize < x.itemsize


def packed(weight: Tensor) -> Tensor | HalfWeight:
    """Return a weight (out, in) in the form in which one row is multiplied fastest, for `frozen_linear` alone.

    On a CPU that is in half as many bytes, or else in stripes (stripes, in, width), by which it takes half to three
    quarters of the time. Stripes are a view yet, which is to be made contiguous.
    """
    if weight.device.type != "cpu" or not HAS_FBGEMM or has_slow_products(weight.dtype, weight.device):
        return weight
    half = HalfWeight.holding(weight) if weight.dtype is torch.float32 else None
    if half is not None:
        return half
    width = max(n for n in range(1, STRIPE // weight.itemsize + 1) if len(weight) % n == 0)
    if width < NARROWEST:
        return weight
    return weight.detach().view(-1, width, weight.shape[1]).transpose(1, 2)


def is_packed(weight: Tensor) -> bool:
    """Tell whether a weight is in stripes."""
    return weight.dim() == 3


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


class Linear(nn.Linear):
    """A linear layer without bias that is fast where it is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        return F.linear(x, self.weight) if trains else frozen_linear(x, self.weight)

    def completed(self, product: Tensor, x: Tensor) -> Tensor:
        """Return the output for x, given its product with the weight."""
        return product


class Completed(Protocol):
    """A layer whose output can be had from a product that was computed with others'."""

    weight: Any

    def completed(self, product: Tensor, x: Tensor) -> Tensor: ...


class Joint(nn.Module):
    """Linear layers of one input whose weights are one: a token at a time, a large product is faster than its parts.

    It is for inference alone, and takes the weights away from its layers.
    """

    def __init__(self, *layers: Completed) -> None:
        super().__init__()
        weights = [layer.weight for layer in layers]
        self.layers, self.sizes = layers, [len(weight) for weight in weights]
        self.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
        for layer in layers:
            layer.weight = None

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the output (T, out) of each layer."""
        products = torch.split(frozen_linear(x, self.weight), self.sizes, dim=1)
        return [layer.completed(product, x) for layer, product in zip(self.layers, products, strict=True)]


def has_slow_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether products of this dtype on this device are better computed in float32.

    Where oneDNN cannot multiply bfloat16, torch falls back to a loop that is ten times slower than float32.
    """
    return dtype is torch.bfloat16 and device.type == "cpu" and not HAS_BFLOAT16_PRODUCTS


class _SlabLinear(torch.autograd.Function):
    """A product with a weight that is cast or dequantized slab by slab, again for the gradient: nothing of it is kept.

    On a CPU a slab never leaves the cache. Where bfloat16 products are slow they are computed in float32, in which
    they are exact but for the order of their sums, and rounded once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: StoredWeight) -> Tensor:
        ctx.weight = weight
        out, wide = x.new_empty(len(x), weight.shape[0]), x.to(arithmetic(x.dtype, x.device))
        for rows in _slabs(weight, x):
            _product(wide, weight[rows].to(wide.dtype), out[:, rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        dtype, slabs = arithmetic(gradient.dtype, gradient.device), _slabs(ctx.weight, gradient)
        parts = (gradient[:, rows].to(dtype) @ ctx.weight[rows].to(dtype) for rows in slabs)
        total = next(parts)
        for part in parts:
            total = total.float().add_(part)  # a sum in bfloat16 would be rounded once for each slab
        return total.to(gradient.dtype), None


class _LongLinear(_SlabLinear):
    """A product with long rows, which is computed in slabs; its gradient has short ones, and is one product."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.weight, None


def _product(x: Tensor, slab: Tensor, out: Tensor) -> None:
    """Write x W^T to its place, rounded if that has another dtype; else nothing lies in memory twice."""
    if out.dtype is x.dtype:
        torch.mm(x, slab.t(), out=out)
    else:
        out.copy_(F.linear(x, slab))


def arithmetic(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which products of this one are computed."""
    return torch.float32 if has_slow_products(dtype, device) else dtype


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
