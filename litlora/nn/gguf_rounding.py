"""What GGML's types change in the values that they store: of weights, and of what llama.cpp multiplies them by.

The values are those of the gguf package's quantizers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK, K_BLOCK = 32, 256


def rounded(x: Tensor, kind: str) -> Tensor:
    """Return the values of float32 numbers (..., width) in one of GGML's types."""
    return ROUNDINGS[kind](x)


def rounded_input(x: Tensor, kind: str) -> Tensor:
    """Return what llama.cpp on a CPU multiplies by a weight of a type, given the float32 input of the product."""
    if kind in ("F32", "F16", "BF16"):
        return rounded(x, kind)
    return rounded(x, "Q8_K" if kind.endswith("_K") else "Q8_0")


def _q8(x: Tensor, width: int, scale_dtype: torch.dtype) -> Tensor:
    blocks = x.reshape(-1, width)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    steps = _nearest(blocks * _inverse(scale))
    return (steps * scale.to(scale_dtype).float()).view(x.shape)


def _q4_0(x: Tensor) -> Tensor:
    blocks = x.reshape(-1, BLOCK)
    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    scale = largest / -8  # so that the largest value has a step of its own, and its opposite has none
    steps = (blocks * _inverse(scale) + 8.5).trunc().clamp(0, 15) - 8
    return (steps * scale.half().float()).view(x.shape)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _nearest(x: Tensor) -> Tensor:
    """Round to integers, a half away from zero."""
    size = x.abs()
    whole = size.floor()
    return (whole + (size - whole >= 0.5)) * x.sign()


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": lambda x: x,
    "F16": lambda x: x.half().float(),
    "BF16": lambda x: x.bfloat16().float(),
    "Q8_0": lambda x: _q8(x, BLOCK, torch.float16),
    "Q8_K": lambda x: _q8(x, K_BLOCK, torch.float32),
    "Q4_0": _q4_0,
}
