"""What torch's libraries make for each new shape, and should not: without padding, hardly two passes have the same."""

import os

import torch

KERNELS = 256
"""Kernels that oneDNN may keep: more than a micro-batch has, or each of its blocks would have them written again."""


def make_few_kernels() -> None:
    """Settle, before the first product, what oneDNN keeps on a CPU and what cuDNN is asked for on a GPU.

    For products of bfloat16 oneDNN writes a kernel for each shape, of 0.6 MB, and would keep 1024; a user's own number
    stands. For attention cuDNN builds a plan for each length, which takes a fifth of a second and saves nothing over
    torch's other kernels.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
    torch.backends.cuda.enable_cudnn_sdp(False)
