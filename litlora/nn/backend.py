"""The backend: everything that depends on the device, and the only door to `cpu/`.

Callers ask `backend(device)` and never which device it is. CUDA is short: torch, FlashAttention and bitsandbytes do the
work. The CPU backend leads to `cpu/`.
"""

import math
import resource
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from litlora.args.finetune import Precision
from litlora.cpu import attention as cpu_attention
from litlora.cpu import matmul, onednn, tuning, weight_layouts
from litlora.cpu.allocator import configure_for_training, give_back
from litlora.cpu.huge_pages import move_to_huge_pages
from litlora.cpu.worker_threads import WorkerThreads as WorkerThreads
from litlora.cpu.worker_threads import worker_count
from litlora.nn.attention import sdpa_per_sequence, varlen_flash_attention
from litlora.nn.attention_spec import AttentionSpec
from litlora.nn.transfer import copy_ahead
from litlora.nn.whole_linear import whole_linear
from litlora.utils.memory import available_memory, forget_peak, resident_memory, total_memory

FLOAT32 = 4  # bytes
WORKSPACES = 2 * 2**25
"""Bytes of cuBLAS's workspaces on a Hopper GPU, forward and backward; others take a quarter of it."""
BLOCK_SCORES = 3
"""Copies of a block's scores in its backward pass on a CPU: probabilities, their gradients, and the scores'."""
SOFTCAP_SCORES = 5
"""Copies of a sequence's scores in its backward pass on a GPU, where there is a softcap."""
SATURATING_WORK = 3.3e11
"""Tokens times parameters of a block from which computing takes an H100 longer than launching the block's kernels: with
Llama 3.2 1B (77 million parameters each), a micro-batch of any size takes 80 ms up to 4,300 tokens."""
TILE_ROWS = 128
"""Rows that a GPU's kernels multiply at once. A product of fewer takes as long, and there are few shapes for which
memory is allocated and a kernel is chosen."""
LAUNCHED_LOGITS = 2**24
"""Logits that become float32 probabilities at once on a GPU, which launches few kernels for them."""

Span = tuple[int, int]
"""How many keys a sequence shares with the one before it, and how many positions it has of its own."""


class FrozenWeight(Protocol):
    """A frozen weight (out, in) in another storage than a tensor's."""

    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """The bytes of its storage."""

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + b (T, out) for x (T, in)."""

    def rows(self, rows: slice, /) -> Tensor:
        """Return some of its rows as a tensor."""

    def to_dense(self) -> Tensor:
        """Return it as a tensor (out, in)."""


class NF4Storage(FrozenWeight, Protocol):
    """A weight that bitsandbytes quantized."""

    def bitsandbytes_matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b by bitsandbytes' own product."""


@dataclass(frozen=True)
class AttentionShape:
    """The heads of one layer, and what its queries see."""

    n_head: int
    n_kv: int
    head_dim: int
    spec: AttentionSpec


class Backend(ABC):
    """What depends on the device; results are equal on all of them up to rounding."""

    shares_prefixes: bool
    """Whether a prefix that sequences of a micro-batch share is computed once."""
    repacking_pays_from: int
    """From how many new tokens on preparing the weights for decoding takes less time than it saves."""
    counts_process_memory: bool
    """Whether the memory of Python and torch comes out of the same memory as the run's tensors."""

    @abstractmethod
    def fuses_optimizers(self, device: torch.device) -> bool:
        """Tell whether torch's optimizers take a step of all parameters by one kernel."""

    @abstractmethod
    def to_device(self, tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
        """Copy tensors of the host to a device, for which the host does not wait."""

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b (T, out) for x (T, in), and a frozen weight (out, in) and bias (out,)."""

    @abstractmethod
    def nf4_linear(self, x: Tensor, weight: NF4Storage, bias: Tensor | None) -> Tensor:
        """Return x W^T + b (T, out) for a weight in NF4."""

    @abstractmethod
    def stored_linear(self, x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
        """Return x W^T + b (T, out) for a weight that is dequantized for each product."""

    @abstractmethod
    def varlen_attention(self, q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], spec: AttentionSpec) -> Tensor:
        """Let every packed sequence attend to itself, causally, and to the prefix that it shares with the one before.

        q is (T, n_head, head_dim), k and v are (T, n_kv, head_dim). Returns (T, n_head, head_dim).
        """

    @abstractmethod
    def scored_rows(self, rows: int, width: int) -> int:
        """Return how many of these rows of logits become float32 probabilities at one time."""

    @abstractmethod
    def prepare_for_decoding(self, layers: Sequence[Any], *, compiled: bool) -> None:
        """Store the dense weights of some linear layers as decoding reads them fastest; they train no more."""

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
    def prepare_for_training(self, *, tight: bool) -> None:
        """Configure the process before the first step; where memory is `tight`, to need little at some cost of time."""

    @abstractmethod
    def matmul_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which products of `dtype` are computed."""

    @abstractmethod
    def peak_memory(self) -> int:
        """Return the most bytes that this process has had so far."""

    @abstractmethod
    def forget_peak_memory(self) -> None:
        """Have `peak_memory` count from now on, where the system can."""

    @abstractmethod
    def memory_in_use(self) -> int:
        """Return the bytes that this process has now, and give back what it has only had."""

    @abstractmethod
    def free_memory(self, device: torch.device) -> int:
        """Return the bytes that this process may take beside those that it has."""

    @abstractmethod
    def total_memory(self, device: torch.device) -> int:
        """Return the bytes of all memory."""

    @abstractmethod
    def relative_time(self, tokens: int, layer_parameters: int, share: float = 1.0) -> float:
        """Return how long a micro-batch takes on a share of the cores, as a multiple of a token in a long one.

        `layer_parameters` are those of a block.
        """

    @abstractmethod
    def cast_rows(self, rows: int) -> int:
        """Return how many rows of a weight exist at one time where products need it in another dtype."""

    @abstractmethod
    def dequantized_rows(self, rows: int, width: int) -> int:
        """Return how many rows of a weight are dequantized at one time, each of them in several steps."""

    @abstractmethod
    def saves_attention_output(self, spec: AttentionSpec, dtype: torch.dtype) -> bool:
        """Tell whether attention saves its output for the backward pass."""

    @abstractmethod
    def attention_saved_bytes(self, shape: AttentionShape, spans: Sequence[Span], dtype: torch.dtype) -> int:
        """Return the bytes of queries, keys, values and statistics that a layer's attention saves for backward."""

    @abstractmethod
    def attention_score_bytes(self, shape: AttentionShape, longest: int) -> int:
        """Return the bytes of the scores of a head, and of values derived from them, that exist at one time."""

    @abstractmethod
    def memory_overheads(self, activations: int, mlp_bytes: int) -> dict[str, int]:
        """Return bytes beside a micro-batch's tensors, by name; `mlp_bytes` are those of one MLP value per token."""


class CPUBackend(Backend):
    """The backend of `cpu/`."""

    shares_prefixes = True
    repacking_pays_from = tuning.REPACK_TOKENS
    counts_process_memory = True

    def fuses_optimizers(self, device: torch.device) -> bool:
        return False  # a few launches cost a CPU nothing, and its adapters stay as they are bit for bit

    def to_device(self, tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
        return tuple(tensors)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return matmul.linear(x, weight, bias)

    def nf4_linear(self, x: Tensor, weight: NF4Storage, bias: Tensor | None) -> Tensor:
        return self.stored_linear(x, weight, bias)

    def stored_linear(self, x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
        return matmul.sliced_linear(x, weight, bias)

    def varlen_attention(self, q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], spec: AttentionSpec) -> Tensor:
        return cpu_attention.varlen_attention(q, k, v, spans, spec)

    def scored_rows(self, rows: int, width: int) -> int:
        return min(rows, max(1, tuning.CACHED_LOGITS // width))

    def prepare_for_decoding(self, layers: Sequence[Any], *, compiled: bool) -> None:
        form = weight_layouts.in_bfloat16 if compiled else weight_layouts.repacked
        workers = self.worker_pool(self.workers(torch.get_num_threads()))
        weight_layouts.store(layers, workers.map(form, (layer.weight for layer in layers)))
        move_to_huge_pages(parameter for layer in layers for parameter in stored_parameters(layer))

    def pad_multiple(self, rows: int, dtype: torch.dtype) -> int:
        return onednn.pad_multiple(rows, dtype)

    def workers(self, requested: int, processes: int = 1) -> int:
        return worker_count(requested, processes)

    def prepare_for_training(self, *, tight: bool) -> None:
        configure_for_training(tight=tight)

    def matmul_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return onednn.matmul_dtype(dtype)

    def peak_memory(self) -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def forget_peak_memory(self) -> None:
        forget_peak()

    def memory_in_use(self) -> int:
        give_back()
        return resident_memory()

    def free_memory(self, device: torch.device) -> int:
        return available_memory()

    def total_memory(self, device: torch.device) -> int:
        return total_memory()

    def relative_time(self, tokens: int, layer_parameters: int, share: float = 1.0) -> float:
        return (tokens + tuning.MICRO_BATCH_TOKENS) / math.pow(share, tuning.CORE_SCALING)

    def cast_rows(self, rows: int) -> int:
        return min(tuning.SLICE_ROWS, rows)

    def dequantized_rows(self, rows: int, width: int) -> int:
        return max(1, tuning.DEQUANTIZED_VALUES // width)

    def saves_attention_output(self, spec: AttentionSpec, dtype: torch.dtype) -> bool:
        return False

    def attention_saved_bytes(self, shape: AttentionShape, spans: Sequence[Span], dtype: torch.dtype) -> int:
        tokens = sum(own for _, own in spans)
        probabilities = cpu_attention.probability_bytes(shape.n_head, shape.n_kv, spans, shape.spec, dtype)
        return tokens * (shape.n_head + 2 * shape.n_kv) * shape.head_dim * dtype.itemsize + probabilities

    def attention_score_bytes(self, shape: AttentionShape, longest: int) -> int:
        block = tuning.BLOCK
        seen = longest if shape.spec.window is None else min(longest, shape.spec.window + block)
        copies = BLOCK_SCORES + (shape.spec.softcap is not None)  # the slope of the softcap is one more
        return copies * FLOAT32 * min(block, longest) * seen

    def memory_overheads(self, activations: int, mlp_bytes: int) -> dict[str, int]:
        return {"fragmentation": max(int(tuning.FRAGMENTATION * activations), tuning.LEAST_FRAGMENTATION * mlp_bytes)}


class CUDABackend(Backend):
    """GPUs, by torch's own kernels."""

    shares_prefixes = False  # a GPU has more use for all sequences at once than for fewer tokens
    repacking_pays_from = 0
    counts_process_memory = False

    def fuses_optimizers(self, device: torch.device) -> bool:
        return device.type == "cuda"  # not the meta device, for which torch has no such kernel

    def to_device(self, tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
        return copy_ahead(tensors, device)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def nf4_linear(self, x: Tensor, weight: NF4Storage, bias: Tensor | None) -> Tensor:
        return weight.bitsandbytes_matmul(x, bias)

    def stored_linear(self, x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
        return whole_linear(x, weight, bias)

    def varlen_attention(self, q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], spec: AttentionSpec) -> Tensor:
        lengths = tuple(own for _, own in spans)
        assert sum(map(sum, spans)) == sum(lengths), "sequences share no prefixes on a GPU"
        if spec.softcap is None and _has_flash_attention(q.device, q.dtype, q.shape[2]):
            return varlen_flash_attention(q, k, v, lengths, spec)
        return sdpa_per_sequence(q, k, v, lengths, spec)

    def scored_rows(self, rows: int, width: int) -> int:
        return min(rows, max(1, LAUNCHED_LOGITS // width))

    def prepare_for_decoding(self, layers: Sequence[Any], *, compiled: bool) -> None:
        disable_cudnn_attention()  # a GPU reads weights as they are

    def pad_multiple(self, rows: int, dtype: torch.dtype) -> int:
        return TILE_ROWS

    def workers(self, requested: int, processes: int = 1) -> int:
        return 1

    def prepare_for_training(self, *, tight: bool) -> None:
        disable_cudnn_attention()

    def matmul_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated()

    def forget_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def memory_in_use(self) -> int:
        return torch.cuda.memory_allocated()

    def free_memory(self, device: torch.device) -> int:
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

    def total_memory(self, device: torch.device) -> int:
        return torch.cuda.mem_get_info(device)[1]

    def relative_time(self, tokens: int, layer_parameters: int, share: float = 1.0) -> float:
        return max(tokens, SATURATING_WORK / layer_parameters)  # as long as few tokens, kernels are launched too slowly

    def cast_rows(self, rows: int) -> int:
        return rows

    def dequantized_rows(self, rows: int, width: int) -> int:
        return max(1, rows)

    def saves_attention_output(self, spec: AttentionSpec, dtype: torch.dtype) -> bool:
        return dtype is torch.bfloat16 and spec.softcap is None  # FlashAttention

    def attention_saved_bytes(self, shape: AttentionShape, spans: Sequence[Span], dtype: torch.dtype) -> int:
        tokens = sum(own for _, own in spans)
        value, heads = shape.head_dim * dtype.itemsize, shape.n_head + 2 * shape.n_kv
        if shape.spec.softcap is not None:
            return tokens * heads * value
        # Without FlashAttention keys and values exist for every head, and an output that is nowhere else.
        heads = heads if self.saves_attention_output(shape.spec, dtype) else 4 * shape.n_head
        return tokens * (heads * value + shape.n_head * FLOAT32)

    def attention_score_bytes(self, shape: AttentionShape, longest: int) -> int:
        return 0 if shape.spec.softcap is None else SOFTCAP_SCORES * FLOAT32 * longest**2

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


def stored_parameters(layer: Any) -> list[torch.nn.Parameter]:
    """Return the parameters that hold a layer's weight, whatever its storage."""
    return [p for name, p in layer.named_parameters() if name.split(".")[0] == "weight"]


@cache
def _has_flash_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Tell whether a GPU has FlashAttention's kernels (Dao 2023) for values of this dtype and heads of this width."""
    fits = dtype is torch.bfloat16 and head_dim % 8 == 0 and head_dim <= 256
    return fits and torch.cuda.get_device_capability(device) >= (8, 0)


def without_autocast(x: Tensor) -> torch.autocast:
    """Return a context in which products are computed in the dtype of their factors, on the device of x."""
    return torch.autocast(x.device.type, enabled=False)


def disable_cudnn_attention() -> None:
    """Have attention on a GPU do without cuDNN, which takes a fifth of a second to plan for each length."""
    torch.backends.cuda.enable_cudnn_sdp(False)
