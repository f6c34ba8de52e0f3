"""What a backend provides: everything that depends on the device. `nn/backend.py` has the backend of a device."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from litlora.cpu.worker_threads import WorkerThreads as WorkerThreads
from litlora.nn.attention_spec import AttentionSpec

FLOAT32 = 4  # bytes

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
