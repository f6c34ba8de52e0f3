"""A file of weights in memory."""

from pathlib import Path

import torch
from torch import Tensor


def map_file(path: Path) -> Tensor:
    """Map a file into memory as bytes (size,)."""
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
