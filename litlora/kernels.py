"""What torch's libraries make for each new shape: without padding hardly two passes have the same, unless rounded."""

import torch

from litlora.linear import HAS_BFLOAT16_PRODUCTS

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


def leave_out_plans() -> None:
    """Have attention on a GPU do without cuDNN, which takes a fifth of a second to plan for each length."""
    torch.backends.cuda.enable_cudnn_sdp(False)
