"""Copies from the host to a GPU, for which neither waits."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def copy_ahead(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Copy tensors to a GPU, beside what it still computes: it is told what to compute long before it does."""
    if device.type != "cuda":  # as the meta device, on which launches are counted
        return tuple(tensor.to(device) for tensor in tensors)
    computing, copying = torch.cuda.current_stream(device), _copy_stream(device)
    with torch.cuda.stream(copying):
        copies = tuple(_pinned(tensor).to(device, non_blocking=True) for tensor in tensors)
    computing.wait_stream(copying)
    for copy in copies:
        copy.record_stream(computing)  # or its memory would be used again once the copying stream is done with it
    return copies


def _pinned(tensor: Tensor) -> Tensor:
    """Return a tensor in memory that a GPU can read by itself: a copy from any other makes the host wait."""
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
