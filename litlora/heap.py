"""The heap of a CPU's C library, which a run would fill with kernels, and each of its passes leave full of gaps."""

import ctypes
import os
from collections.abc import Callable

from torch import Tensor, nn

EVERY = 10
"""Blocks from one return to the next: fewer take time to fill the same memory again, more leave larger gaps."""

KERNELS = 256
"""Kernels that oneDNN may keep: more than a micro-batch has, or each of its blocks would have them written again."""


def keep_few_kernels() -> None:
    """Have oneDNN, before its first product, keep fewer of the kernels that it writes for products of bfloat16.

    It writes one for each shape, of 0.6 MB, and keeps 1024; but micro-batches without padding hardly ever have the
    same shape. A user's own number stands.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


def spares_memory(quantize: str | None, activation_checkpointing: bool) -> bool:
    """Tell whether a run is to be small before it is fast, so that its blocks are worth keeping small."""
    return quantize is not None or activation_checkpointing


def keep_small(blocks: nn.ModuleList) -> None:
    """Have blocks that train return the gaps of the heap to the system, every few of them, forth and back.

    What a block keeps for its gradient settles in the room of temporaries, so that the next block needs new room for
    its own: after thirty blocks the gaps would be half as large as what is kept, or as large. Only glibc can return
    them, and what is returned takes time to fill again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        for block in blocks[EVERY - 1 :: EVERY]:
            block.register_forward_hook(lambda _block, _inputs, out: _trim_around(out, trim))


def _trim_around(out: Tensor, trim: Callable[[int], int]) -> None:
    """Trim the heap now, and again once there is a gradient of what a block returned."""

    def trim_again(_gradient: Tensor) -> None:
        trim(0)

    if out.requires_grad:
        trim(0)
        out.register_hook(trim_again)  # type: ignore[no-untyped-call]
