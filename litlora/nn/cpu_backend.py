"""The backend of CPUs, which leads to `cpu/`."""

import math
import resource
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from litlora.cpu import attention as cpu_attention
from litlora.cpu import matmul, onednn, tuning, weight_layouts
from litlora.cpu.allocator import configure_for_training, give_back
from litlora.cpu.huge_pages import move_to_huge_pages
from litlora.cpu.worker_threads import worker_count
from litlora.nn.attention_spec import AttentionSpec
from litlora.nn.backend_interface import FLOAT32, AttentionShape, Backend, FrozenWeight, NF4Storage, Span
from litlora.utils.memory import available_memory, forget_peak, resident_memory, total_memory

BLOCK_SCORES = 3
"""Copies of a block's scores in its backward pass on a CPU: probabilities, their gradients, and the scores'."""


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
        move_to_huge_pages(parameter for layer in layers for parameter in _stored_parameters(layer))

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


def _stored_parameters(layer: Any) -> list[torch.nn.Parameter]:
    """Return the parameters that hold a layer's weight, whatever its storage."""
    return [p for name, p in layer.named_parameters() if name.split(".")[0] == "weight"]
