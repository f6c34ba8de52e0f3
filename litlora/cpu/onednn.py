"""What oneDNN can multiply on this CPU, and the padding that keeps its kernel cache small."""

import torch

GRAIN = 16
"""Rows of a product that are too few to be counted one by one, where each shape costs memory."""


def writes_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether each new shape of a product of this dtype on this device costs memory.

    For bfloat16 on a CPU oneDNN writes a kernel, of 0.6 MB, of which half is never given back.
    """
    return dtype is torch.bfloat16 and device.type == "cpu" and HAS_BFLOAT16_PRODUCTS


def grain(rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return of what so many rows of a product had better be a multiple, which makes them 3 % more at the most."""
    return max(GRAIN, 2 ** (rows.bit_length() - 6)) if writes_kernels(dtype, device) else 1


HAS_BFLOAT16_PRODUCTS: bool = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
"""Whether oneDNN can multiply bfloat16 on this CPU: a constant, which torch's compiler need not trace."""


def has_slow_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether products of this dtype on this device are better computed in float32.

    Where oneDNN cannot multiply bfloat16, torch falls back to a loop that is ten times slower than float32.
    """
    return dtype is torch.bfloat16 and device.type == "cpu" and not HAS_BFLOAT16_PRODUCTS


def arithmetic(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which products of this one are computed."""
    return torch.float32 if has_slow_products(dtype, device) else dtype
