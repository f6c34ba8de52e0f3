"""The backend: everything that depends on the device, and the only door to `cpu/`.

Callers ask `backend(device)` and never which device it is. CUDA is short: torch, FlashAttention and bitsandbytes do the
work. The CPU backend leads to `cpu/`.
"""

import resource
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from litlora.args import Precision
from litlora.cpu import attention as cpu_attention
from litlora.cpu.allocator import configure_for_training
from litlora.cpu.matmul import SLAB
from litlora.cpu.onednn import arithmetic, grain
from litlora.cpu.worker_threads import WorkerThreads as WorkerThreads
from litlora.cpu.worker_threads import worker_count

FLOAT32 = 4  # bytes
WORKSPACES = 2 * 2**25
"""Bytes of cuBLAS's workspaces on a Hopper GPU, forward and backward; others take a quarter of it."""
FRAGMENTATION = 0.27
"""Share of the activations that glibc's allocator has free while they are in use; measured."""
LEAST_FRAGMENTATION = 20
"""The same at the least, in MLP values of each token: where few activations are saved."""

Span = tuple[int, int]
"""How many keys a sequence shares with the one before it, and how many positions it has of its own."""


@dataclass(frozen=True)
class AttentionShape:
    """The heads of one layer, and what its queries see."""

    n_head: int
    n_kv: int
    head_dim: int
    window: int | None


class Backend(ABC):
    """What a device does its own way; the numbers are the same on all of them, up to rounding."""

    shares_prefixes: bool
    """Whether a prefix that sequences of a micro-batch share is computed once."""
    decodes_repacked: bool
    """Whether weights are repacked for decoding, which takes time before the first token."""
    counts_process_memory: bool
    """Whether the memory of Python and torch comes out of the same memory as the run's tensors."""

    @abstractmethod
    def pad_multiple(self, rows: int, dtype: torch.dtype) -> int:
        """Return the number of which `rows` of a product should be a multiple."""

    @abstractmethod
    def workers(self, requested: int, processes: int = 1) -> int:
        """Return how many micro-batches each of `processes` on a machine computes concurrently."""

    def worker_pool(self, count: int) -> WorkerThreads:
        """Return a pool of workers for micro-batches."""
        return WorkerThreads(count)

    @abstractmethod
    def prepare_for_training(self) -> None:
        """Configure the process before the first step."""

    @abstractmethod
    def matmul_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which products of `dtype` are computed."""

    @abstractmethod
    def peak_memory(self) -> int:
        """Return the most bytes that this process has had so far."""

    @abstractmethod
    def cast_rows(self, rows: int) -> int:
        """Return how many rows of a weight exist at one time where products need it in another dtype."""

    @abstractmethod
    def saves_attention_output(self, dtype: torch.dtype) -> bool:
        """Tell whether attention saves its output for the backward pass."""

    @abstractmethod
    def attention_saved_bytes(self, shape: AttentionShape, spans: Sequence[Span], dtype: torch.dtype) -> int:
        """Return the bytes of queries, keys, values and statistics that a layer's attention saves for backward."""

    @abstractmethod
    def attention_score_bytes(self, shape: AttentionShape, longest: int) -> int:
        """Return the bytes of one copy of the scores of a head that exist at one time."""

    @abstractmethod
    def memory_overheads(self, activations: int, mlp_bytes: int) -> dict[str, int]:
        """Return bytes beside a micro-batch's tensors, by name; `mlp_bytes` are those of one MLP value per token."""


class CPUBackend(Backend):
    """The backend of `cpu/`."""

    shares_prefixes = True
    decodes_repacked = True
    counts_process_memory = True
    _device = torch.device("cpu")

    def pad_multiple(self, rows: int, dtype: torch.dtype) -> int:
        return grain(rows, dtype, self._device)

    def workers(self, requested: int, processes: int = 1) -> int:
        return worker_count(self._device, requested, processes)

    def prepare_for_training(self) -> None:
        configure_for_training()

    def matmul_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return arithmetic(dtype, self._device)

    def peak_memory(self) -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def cast_rows(self, rows: int) -> int:
        return min(SLAB, rows)

    def saves_attention_output(self, dtype: torch.dtype) -> bool:
        return False

    def attention_saved_bytes(self, shape: AttentionShape, spans: Sequence[Span], dtype: torch.dtype) -> int:
        tokens = sum(own for _, own in spans)
        probabilities = cpu_attention.probability_bytes(
            shape.n_head, shape.n_kv, spans, shape.window, dtype, self._device
        )
        return tokens * (shape.n_head + 2 * shape.n_kv) * shape.head_dim * dtype.itemsize + probabilities

    def attention_score_bytes(self, shape: AttentionShape, longest: int) -> int:
        block = cpu_attention.BLOCK
        seen = longest if shape.window is None else min(longest, shape.window + block)
        return FLOAT32 * min(block, longest) * seen

    def memory_overheads(self, activations: int, mlp_bytes: int) -> dict[str, int]:
        return {"fragmentation": max(int(FRAGMENTATION * activations), LEAST_FRAGMENTATION * mlp_bytes)}


class CUDABackend(Backend):
    """GPUs, by torch's own kernels."""

    shares_prefixes = False  # a GPU has more use for all sequences at once than for fewer tokens
    decodes_repacked = False
    counts_process_memory = False

    def pad_multiple(self, rows: int, dtype: torch.dtype) -> int:
        return 1

    def workers(self, requested: int, processes: int = 1) -> int:
        return 1

    def prepare_for_training(self) -> None:
        disable_cudnn_attention()

    def matmul_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated()

    def cast_rows(self, rows: int) -> int:
        return rows

    def saves_attention_output(self, dtype: torch.dtype) -> bool:
        return dtype is torch.bfloat16  # FlashAttention

    def attention_saved_bytes(self, shape: AttentionShape, spans: Sequence[Span], dtype: torch.dtype) -> int:
        # Without FlashAttention keys and values exist for every head, and an output that is nowhere else.
        heads = shape.n_head + 2 * shape.n_kv if self.saves_attention_output(dtype) else 4 * shape.n_head
        tokens = sum(own for _, own in spans)
        return tokens * (heads * shape.head_dim * dtype.itemsize + shape.n_head * FLOAT32)

    def attention_score_bytes(self, shape: AttentionShape, longest: int) -> int:
        return 0

    def memory_overheads(self, activations: int, mlp_bytes: int) -> dict[str, int]:
        return {"cuBLAS": WORKSPACES}


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


def disable_cudnn_attention() -> None:
    """Have attention on a GPU do without cuDNN, which takes a fifth of a second to plan for each length."""
    torch.backends.cuda.enable_cudnn_sdp(False)
