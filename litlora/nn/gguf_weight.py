"""Frozen weights as a GGUF file has them: blocks of quantized values, dequantized in chunks.

The values are those of the gguf package's numpy functions, bit for bit. Bits are taken apart four bytes at a time, in
32-bit words, for which processors have vector instructions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from litlora.nn.backend import backend
from litlora.nn.gguf_types import BlockType
from litlora.nn.quantization import GGUF, Quantization, StoredWeight

SCALE = 2  # bytes of a float16
SIXTEEN = torch.complex128  # a dtype of 16 bytes, as which they are copied at once
K_SCALES = 12  # bytes of the eight scales and minima of Q4_K and Q5_K, 6 bits each


class GGUFWeight(StoredWeight):
    """A frozen weight (out, in) in blocks of one type; its rows may be a memory map of the file."""

    packed: nn.Parameter

    def __init__(self, packed: Tensor, kind: BlockType, dtype: torch.dtype) -> None:
        """Take the bytes of each row (out, bytes)."""
        super().__init__()
        self.kind, self.quantization = kind, Quantization(GGUF, dtype)
        self.shape = torch.Size((len(packed), packed.shape[1] // kind.nbytes * kind.values))
        self.packed = nn.Parameter(packed, requires_grad=False)
        self._kept: Tensor | None = None

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + b (T, out) for x (T, in)."""
        return backend(x.device).stored_linear(x, self, bias)

    def rows(self, rows: slice) -> Tensor:
        """Return some rows, dequantized."""
        if self._kept is not None and self._kept.dtype is self.quantization.dtype:
            return self._kept[rows]
        packed = self.packed[rows]
        out = packed.new_empty(len(packed), self.shape[1], dtype=self.quantization.dtype)
        return dequantize(packed, self.kind, out)

    def keep(self, values: Tensor | None) -> None:
        """Take the values of `to_dense` from memory from now on, or with None, compute them each time."""
        self._kept = values


def keep_values(model: nn.Module, room: int) -> list[GGUFWeight]:
    """Keep the values of a model's weights in memory, if they take at most `room` bytes: each token needs all of them.

    No result changes, and what decodes one token at a time no longer takes most of its time to dequantize.
    """
    weights = [module for module in model.modules() if isinstance(module, GGUFWeight)]
    if sum(weight.shape.numel() * weight.quantization.dtype.itemsize for weight in weights) > room:
        return []
    for weight in weights:
        weight.keep(weight.to_dense())
    return weights


@contextmanager
def kept_values(model: nn.Module, room: int) -> Iterator[None]:
    """Keep the values as long as the block runs."""
    kept = keep_values(model, room)
    try:
        yield
    finally:
        for weight in kept:
            weight.keep(None)


def dequantize(packed: Tensor, kind: BlockType, out: Tensor) -> Tensor:
    """Write the values of the bytes of some rows (rows, bytes) to `out` (rows, width), and return it.

    On a CPU a few at a time are computed, so that all on the way stays in the cache.
    """
    if kind.values == 1:
        return out.copy_(packed.view(PLAIN[kind.name]))
    write, step = DEQUANTIZERS[kind.name], backend(packed.device).dequantized_rows(*out.shape)
    for some, target in zip(torch.split(packed, step), torch.split(out, step), strict=True):
        values = target if out.dtype is torch.float32 else torch.empty_like(target, dtype=torch.float32)
        write(some.reshape(-1, kind.nbytes), values.view(-1, kind.values))
        if values is not target:
            target.copy_(values)
    return out


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    _scale(_nibbles(blocks[:, 2:], 16), 8, _half(blocks, 0), out)


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    _scale(_nibbles(blocks[:, 4:], 16), 0, _half(blocks, 0), out).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    _scale(_with_fifth_bits(blocks[:, 2:]), 16, _half(blocks, 0), out)


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    _scale(_with_fifth_bits(blocks[:, 4:]), 0, _half(blocks, 0), out).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    _scale(blocks[:, 2:], 0, _half(blocks, 0), out)


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    scales, minima = _scales_and_minima(blocks)
    values = _nibbles(blocks[:, 2 * SCALE + K_SCALES :], 32).view(-1, 8, 32)
    _scale(values, 0, scales, out.view(-1, 8, 32)).sub_(minima)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    scales, minima = _scales_and_minima(blocks)
    high, low = torch.split(blocks[:, 2 * SCALE + K_SCALES :], [32, 128], dim=1)
    words, values = _words(high), _nibbles(low, 32).view(-1, 8, 32)
    for group, own in enumerate(values.view(torch.int32).unbind(1)):  # bit n of each byte is for group n
        own.bitwise_or_(_bits(words, group, 0x01010101) << 4)
    _scale(values, 0, scales, out.view(-1, 8, 32)).sub_(minima)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    low, high, scales, scale = torch.split(blocks, [128, 64, 16, SCALE], dim=1)
    values = _nibbles(low, 64).view(-1, 2, 4, 32)
    words, own = _words(high).view(-1, 2, 8), values.view(torch.int32)
    for group in range(4):  # bits 2n and 2n + 1 of each byte are for group n of a half
        own[:, :, group].bitwise_or_(_bits(words, 2 * group, 0x03030303) << 4)
    factors = scales.view(torch.int8).float().mul_(_half(scale, 0))
    _scale(values.view(-1, 16, 16), 32, factors[:, :, None], out.view(-1, 16, 16))


DEQUANTIZERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""What writes the values of blocks (n, bytes) to a float32 tensor (n, values)."""
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _half(blocks: Tensor, start: int) -> Tensor:
    """Return the float16 of each block (n, 1) that starts at a byte, in float32."""
    return blocks[:, start : start + SCALE].contiguous().view(torch.float16).float()


def _words(some: Tensor) -> Tensor:
    """Return bytes (n, 4 w) as words (n, w)."""
    return some.contiguous().view(torch.int32)


def _bits(words: Tensor, shift: int, mask: int) -> Tensor:
    """Return some bits of each byte; the mask leaves out what is shifted in from the next byte, or the sign."""
    return (words >> shift if shift else words) & mask


def _nibbles(some: Tensor, width: int) -> Tensor:
    """Return the low halves of each `width` bytes of a block, then the high ones (n, 2 bytes), as bytes."""
    words = _words(some)
    pairs = words.new_empty(len(some), words.shape[1] * 2).view(SIXTEEN).view(len(some), -1, 2, width // 16)
    for half in range(2):
        pairs[:, :, half] = _bits(words, 4 * half, 0x0F0F0F0F).view(SIXTEEN).view(len(some), -1, width // 16)
    return pairs.view(len(some), -1).view(torch.uint8)


def _with_fifth_bits(rest: Tensor) -> Tensor:
    """Return the values of blocks (n, 4 + 16) that begin with the fifth bit of each (n, 32)."""
    high, low = torch.split(rest, [4, 16], dim=1)
    values = _nibbles(low, 16)
    values.view(torch.int64).bitwise_or_(_fifth_bits(rest.device)[high.int()])
    return values


@cache
def _fifth_bits(device: torch.device) -> Tensor:
    """Return eight bytes for each byte, as one integer: 16 where its bit is set."""
    bits = torch.arange(256, dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return (bits << 4).view(torch.int64)[:, 0].to(device)


def _scale(values: Tensor, zero: int, scales: Tensor, out: Tensor) -> Tensor:
    """Write (values - zero) · scales, for values in bytes and one scale for each last dimension, to `out`."""
    signed = values.view(torch.int8)
    return out.copy_(signed - zero if zero else signed).mul_(scales)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the eight groups of a block are multiplied by, and what is subtracted (n, 8, 1)."""
    packed = blocks[:, 2 * SCALE : 2 * SCALE + K_SCALES].contiguous()
    first, second, both = torch.split(packed, 4, dim=1)
    scales = torch.cat([first & 63, (both & 15) | ((first >> 2) & 48)], dim=1)
    minima = torch.cat([second & 63, (both >> 4) | ((second >> 2) & 48)], dim=1)
    return _times_half(scales, blocks, 0), _times_half(minima, blocks, SCALE)


def _times_half(factors: Tensor, blocks: Tensor, start: int) -> Tensor:
    return factors.float().mul_(_half(blocks, start))[:, :, None]
