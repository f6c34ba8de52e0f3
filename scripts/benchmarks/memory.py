"""Peak memory of a program: on the GPU, or else resident."""

from pathlib import Path

import torch


def peak_memory_gb() -> float:
    """Return the peak memory of this process in gigabytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
