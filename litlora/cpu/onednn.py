"""What oneDNN multiplies on this CPU, and the padding that keeps its kernel cache small."""

import torch

from litlora.cpu.tuning import PAD_MULTIPLE
from litlora.torch_private import has_bfloat16_matmul

HAS_BFLOAT16_PRODUCTS = has_bfloat16_matmul()
"""Whether oneDNN multiplies bfloat16 on this CPU: a constant, which torch's compiler need not trace."""


def caches_kernels(dtype: torch.dtype) -> bool:
    """Tell whether each new shape of a product of this dtype costs memory.

    For bfloat16 oneDNN generates a kernel of 0.6 MB, half of which is never freed.
    """
    return dtype is torch.bfloat16 and HAS_BFLOAT16_PRODUCTS


def pad_multiple(rows: int, dtype: torch.dtype) -> int:
    """Return the number to a multiple of which the rows of a product are padded, by 3 % at most if they are many."""
    return max(PAD_MULTIPLE, 2 ** (rows.bit_length() - 6)) if caches_kernels(dtype) else 1


def has_slow_products(dtype: torch.dtype) -> bool:
    """Tell whether products of this dtype are better computed in float32.

    Where oneDNN cannot multiply bfloat16, torch falls back to a loop that is ten times slower than float32.
    """
    return dtype is torch.bfloat16 and not HAS_BFLOAT16_PRODUCTS


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of this one are computed."""
    return torch.float32 if has_slow_products(dtype) else dtype
