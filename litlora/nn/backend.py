"""The backend of a device. Callers ask `backend(device)`, and never which device it is."""

import torch
from torch import Tensor

from litlora.args.finetune import Precision
from litlora.nn.backend_interface import Backend
from litlora.nn.cpu_backend import CPUBackend
from litlora.nn.cuda_backend import CUDABackend

CPU, CUDA = CPUBackend(), CUDABackend()


def backend(device: torch.device) -> Backend:
    """Return the backend of a device."""
    return CPU if device.type == "cpu" else CUDA


def default_device() -> torch.device:
    """Return the first GPU that torch sees, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of what the linear layers of a block return at this --precision."""
    return torch.float32 if precision == "32-true" else torch.bfloat16


def without_autocast(x: Tensor) -> torch.autocast:
    """Return a context in which products are computed in the dtype of their factors, on the device of x."""
    return torch.autocast(x.device.type, enabled=False)
