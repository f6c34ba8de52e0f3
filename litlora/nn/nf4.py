"""Linear layers with a frozen 4-bit weight (QLoRA, Dettmers et al. 2023), by bitsandbytes."""

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from litlora.errors import LitLoraError
from litlora.nn.backend import backend
from litlora.nn.quantization import DOUBLE as DOUBLE
from litlora.nn.quantization import NAMES as NAMES
from litlora.nn.quantization import Quantization as Quantization
from litlora.nn.quantization import QuantizedLinear, StoredWeight

BLOCK = 64
"""Values that share a scale, which is their largest magnitude."""
OUTER_BLOCK = 256
"""Scales that share a scale of their own, under double quantization."""
CHUNK = 2**17
"""Values that are quantized at one time, so that what bitsandbytes computes on the way stays small."""
OLDEST = "0.49"
FLAG = "a 4-bit base"
"""What needs bitsandbytes once the flags are checked."""


@cache
def import_bitsandbytes(flag: str) -> Any:
    """Import bitsandbytes, which takes seconds, for the flag that needs it."""
    hint = f"get it with: pip install 'bitsandbytes>={OLDEST}'"
    try:
        with _without_kernels_of_the_hub():
            module = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise LitLoraError(f"{flag} needs bitsandbytes, which cannot be imported ({error}); {hint}") from error
    installed, least = ([int(part) for part in version.split(".")[:2]] for version in (module.__version__, OLDEST))
    if installed < least:
        raise LitLoraError(f"{flag} needs bitsandbytes {OLDEST} or newer, not {module.__version__}; {hint}")
    return module


@contextmanager
def _without_kernels_of_the_hub() -> Iterator[None]:
    """Keep bitsandbytes from code of the Hub: where a CPU multiplies bfloat16, it imports some by the package kernels.

    That is for products that are not used here, and without it bitsandbytes logs advice to install the package.
    """
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, package = log.level, sys.modules.get("kernels")
    log.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # whoever imports it is told that there is none
    try:
        yield
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if package is not None:
            sys.modules["kernels"] = package


class NF4Linear(QuantizedLinear):
    """A frozen linear layer whose weight is in NF4."""

    def __init__(self, weight: Tensor, quantization: Quantization, bias: Tensor | None = None) -> None:
        super().__init__(NF4Weight(weight, quantization), bias)


class NF4Weight(StoredWeight):
    """A frozen weight (out, in): 4-bit indices of 16 levels, two per byte, and a float32 scale for each block.

    The scales are stored as integers of the same bits, so that casting the model leaves them unchanged.
    """

    packed: nn.Parameter
    scales: nn.Parameter
    outer_scales: Tensor
    mean_scale: Tensor

    def __init__(self, weight: Tensor, quantization: Quantization) -> None:
        super().__init__()
        assert quantization.name in NAMES
        self.shape, self.quantization = weight.shape, quantization
        packed, scales = _quantize(weight.to(quantization.dtype).flatten())
        self.packed = nn.Parameter(packed, requires_grad=False)  # (out * in / 2,)
        if not quantization.double:
            self.scales = nn.Parameter(scales.view(torch.int32), requires_grad=False)  # (out * in / 64,)
            return
        mean = scales.mean()
        scales, outer = _functional().quantize_blockwise(scales - mean, blocksize=OUTER_BLOCK)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.register_buffer("outer_scales", outer.absmax.view(torch.int32))
        self.register_buffer("mean_scale", mean.view(torch.int32))

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + b (T, out) for x (T, in)."""
        return backend(x.device).nf4_linear(x, self, bias)

    def rows(self, rows: slice) -> Tensor:
        """Return some rows, dequantized; the first row must start with a block."""
        start, stop, _ = (bound * self.shape[1] for bound in rows.indices(self.shape[0]))
        assert start % BLOCK == 0
        packed, scales = self.packed[start // 2 : -(-stop // 2)], self._scales()[start // BLOCK : -(-stop // BLOCK)]
        # Where a CPU has no bfloat16, float32 gives the same bits in half the time of bitsandbytes' own.
        dtype = backend(packed.device).matmul_dtype(self.quantization.dtype)
        # Threads share the rows of a shape, but bitsandbytes' AVX-512 code is wrong if they do not end with a block.
        width = self.shape[1] if self.shape[1] % BLOCK == 0 else stop - start
        shape = ((stop - start) // width, width)
        values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, scales, BLOCK, "nf4", shape, dtype)
        return values.view(-1, self.shape[1]).to(self.quantization.dtype)

    def bitsandbytes_matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + b by bitsandbytes' own product, which reads the weight as it is stored."""
        packed = self.packed.view(-1, 1).t()
        out: Tensor = import_bitsandbytes(FLAG).matmul_4bit(x, packed, self._quant_state(), bias=bias)
        return out

    def _quant_state(self) -> Any:
        """Return bitsandbytes' description of the weight, which refers to the tensors here."""
        functional, device = _functional(), self.device
        settings = {"shape": self.shape, "code": _levels(device), "blocksize": BLOCK, "quant_type": "nf4"}
        settings["dtype"] = self.quantization.dtype
        if not self.quantization.double:
            return functional.QuantState(self.scales.view(torch.float32), **settings)
        outer, offset = self.outer_scales.view(torch.float32), self.mean_scale.view(torch.float32)
        nested = functional.QuantState(outer, code=_scale_levels(device), blocksize=OUTER_BLOCK, dtype=torch.float32)
        return functional.QuantState(self.scales, offset=offset, state2=nested, **settings)

    def _scales(self) -> Tensor:
        if not self.quantization.double:
            return self.scales.view(torch.float32)
        outer = self.outer_scales.view(torch.float32)
        scales: Tensor = _functional().dequantize_blockwise(self.scales, absmax=outer, blocksize=OUTER_BLOCK)
        return scales.add_(self.mean_scale.view(torch.float32))


def _quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the packed levels of some values (n,), and the scales of their blocks."""
    _functional()
    parts = [
        torch.ops.bitsandbytes.quantize_4bit(part, BLOCK, "nf4", torch.uint8) for part in torch.split(values, CHUNK)
    ]
    packed, scales = (torch.cat(some) for some in zip(*parts, strict=True))
    return packed.flatten(), scales


@cache
def _levels(device: torch.device) -> Tensor:
    levels: Tensor = _functional().get_4bit_type("nf4", device=device)
    return levels


@cache
def _scale_levels(device: torch.device) -> Tensor:
    """Return the values that 8-bit scales stand for."""
    levels: Tensor = _functional().create_dynamic_map().to(device)
    return levels


def _functional() -> Any:
    return import_bitsandbytes(FLAG).functional


def dequantized(weight: Tensor, quantization: Quantization) -> Tensor:
    """Return a weight (out, in) in its own dtype as it is once it has been in NF4."""
    return NF4Weight(weight, quantization).to_dense().to(weight.dtype)
