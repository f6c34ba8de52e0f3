"""Layouts of a frozen weight in which a CPU multiplies one row faster: for decoding, without gradients."""

from collections.abc import Iterable
from math import frexp, inf
from typing import Any, Self

import torch
from torch import Tensor, nn

from litlora.cpu.allocator import give_back
from litlora.cpu.matmul import add_bias
from litlora.cpu.onednn import has_slow_products
from litlora.cpu.tuning import FEWEST_OUTPUTS, HALF_ROWS, STRIPE_OUTPUTS
from litlora.torch_private import multiply_half, prepack_half, unpack_half

HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
"""Whether torch has the library that multiplies a row by a packed weight."""

FLOAT16_BITS = 16
"""float16's largest finite value is below 2**16."""

SCANNED_ROWS = 64
"""Rows of a weight that are compared with their values in another dtype at once: they stay in the cache."""

TINY = 1e-30
"""The least largest value that a power of two brings near float16's largest without overflowing float32."""


class StripedWeight(nn.Module):
    """A bfloat16 weight (out, in) in stripes (stripes, in, width), which holds `width` outputs next to each other.

    One row times a stripe is a weighted sum of the stripe's rows. To torch that is a bag of embeddings, which it reads
    nearly as fast as memory can be read, and sums in float32.
    """

    def __init__(self, weight: Tensor, width: int) -> None:
        super().__init__()
        self.shape, self.width = weight.shape, width
        stripes = weight.detach().view(-1, width, weight.shape[1]).transpose(1, 2).contiguous()
        self.stripes = nn.Parameter(stripes, requires_grad=False)
        count, size, _ = stripes.shape
        rows = torch.arange(count * size + 1, dtype=torch.int32)
        self.register_buffer("bag_rows", rows[:-1], persistent=False)
        self.register_buffer("bag_starts", rows[::size], persistent=False)  # and the end of the last
        self.bag_rows: Tensor
        self.bag_starts: Tensor

    @property
    def nbytes(self) -> int:
        return self.stripes.nbytes

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + b (T, out) for x (T, in)."""
        stripes = len(self.stripes)
        if len(x) > 1:
            products = torch.bmm(x.expand(stripes, -1, -1), self.stripes)
            return add_bias(products.transpose(0, 1).reshape(len(x), -1), bias)
        factors = x.expand(stripes, -1).reshape(-1)
        table, settings = self.stripes.view(-1, self.width), (False, 0, False, factors, True)
        out, *_ = torch.embedding_bag(table, self.bag_rows, self.bag_starts, *settings)
        return add_bias(out.view(1, -1), bias)

    def rows(self, rows: slice) -> Tensor:
        return self.to_dense()[rows]

    def to_dense(self) -> Tensor:
        return self.stripes.transpose(1, 2).reshape(self.shape)


class HalfWeight:
    """A float32 weight (out, in) that FBGEMM packs in float16, which holds its values exactly: half as many bytes.

    The values are stored times a power of two, so that the largest is near float16's largest: below it, values of
    bfloat16's 8 bits may be smaller by 32 powers of two. Products are float32.
    """

    def __init__(self, weight: Tensor, factor: float) -> None:
        self.shape = weight.shape
        self.parts = [prepack_half(rows / factor) for rows in torch.split(weight, HALF_ROWS)]
        self.factor = torch.tensor(factor)  # a number would be made a tensor for each product

    @classmethod
    def holding(cls, weight: Tensor) -> Self | None:
        """Return a weight in float16, or None where one of its values would be rounded."""
        least, most = (value.item() for value in torch.aminmax(weight))
        largest = max(-least, most)
        if not TINY < largest < inf:
            return None
        factor = 2.0 ** (frexp(largest)[1] - FLOAT16_BITS)
        return cls(weight, factor) if _holds(torch.float16, weight, factor) else None

    @property
    def nbytes(self) -> int:
        return 2 * self.shape.numel()

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + b (T, out) for x (T, in)."""
        products = [multiply_half(x, part) for part in self.parts]
        out = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        return add_bias(out.mul_(self.factor), bias)

    def rows(self, rows: slice) -> Tensor:
        return self.to_dense()[rows]

    def to_dense(self) -> Tensor:
        return torch.cat([unpack_half(part) for part in self.parts]) * self.factor


def repacked(weight: Tensor) -> Tensor | StripedWeight | HalfWeight:
    """Return a weight (out, in) in the storage in which one row is multiplied fastest, if there is a faster one."""
    if not HAS_FBGEMM:
        return weight
    if weight.dtype is torch.float32:
        return HalfWeight.holding(weight) or weight
    width = max(n for n in range(1, STRIPE_OUTPUTS + 1) if len(weight) % n == 0)
    if has_slow_products(weight.dtype) or width < FEWEST_OUTPUTS:
        return weight
    return StripedWeight(weight, width)


def in_bfloat16(weight: Tensor) -> Tensor:
    """Return a float32 weight in bfloat16 if that holds its values exactly, as those of most checkpoints.

    A compiled product then reads half as many bytes, and is computed in float32 all the same.
    """
    return weight.bfloat16() if weight.dtype is torch.float32 and _holds(torch.bfloat16, weight) else weight


def store(layers: Iterable[Any], weights: Iterable[Any]) -> None:
    """Give each layer its weight in another storage."""
    for layer, weight in zip(layers, weights, strict=True):
        del layer.weight  # torch assigns nothing but a parameter to a parameter's name
        layer.weight = nn.Parameter(weight, requires_grad=False) if isinstance(weight, Tensor) else weight
        give_back()  # or many of the weights would be in memory twice


def _holds(dtype: torch.dtype, weight: Tensor, factor: float = 1.0) -> bool:
    """Tell whether a dtype holds all values of a weight, divided by a power of two, exactly."""
    parts = (rows / factor for rows in torch.split(weight, SCANNED_ROWS))
    return all(torch.equal(part.to(dtype).to(weight.dtype), part) for part in parts)
