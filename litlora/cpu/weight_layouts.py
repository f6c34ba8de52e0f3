"""Layouts of a frozen weight in which a CPU multiplies a single row faster."""

from collections.abc import Sequence
from math import frexp, inf
from typing import Any, Self

import torch
from torch import Tensor

from litlora.cpu.onednn import has_slow_products

HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
"""Whether torch has the library that multiplies a row by a packed weight."""

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
