"""The backend of GPUs: torch, FlashAttention and bitsandbytes do the work."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litlora.nn.attention import sdpa_per_sequence, varlen_flash_attention
from litlora.nn.attention_spec import AttentionSpec
from litlora.nn.backend_interface import FLOAT32, AttentionShape, Backend, FrozenWeight, NF4Storage, Span
from litlora.nn.transfer import copy_ahead
from litlora.nn.whole_linear import whole_linear

WORKSPACES = 2 * 2**25
"""Bytes of cuBLAS's workspaces on a Hopper GPU, forward and backward; others take a quarter of it."""
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


@cache
def _has_flash_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Tell whether a GPU has FlashAttention's kernels (Dao 2023) for values of this dtype and heads of this width."""
    fits = dtype is torch.bfloat16 and head_dim % 8 == 0 and head_dim <= 256
    return fits and torch.cuda.get_device_capability(device) >= (8, 0)


def disable_cudnn_attention() -> None:
    """Have attention on a GPU do without cuDNN, which takes a fifth of a second to plan for each length."""
    torch.backends.cuda.enable_cudnn_sdp(False)
