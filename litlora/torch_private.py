"""The private torch APIs that litlora uses: pyproject.toml requires `torch<2.14` because of them.

They may change without notice in any torch release. Before raising the limit, check each of them:

- `softmax_backward`, `silu_backward` and `gelu_backward`: torch's own backward functions, which write no intermediate
  values.
- `has_bfloat16_matmul`: whether oneDNN multiplies bfloat16 on this CPU.
- `flash_attention`: FlashAttention of packed sequences, where torch has no public `varlen_attn` yet.
- `prepack_half`, `multiply_half` and `unpack_half`: FBGEMM's products with weights that are packed in float16.
- `dynamo_error`, `is_missing_compiler`, `inductor_cache` and `dynamic_shapes`: what torch.compile raises, where it
  keeps what it compiled, and a setting of it.
- `litlora/generation/compile.py` passes options to inductor, and `litlora/distributed/heartbeat.py` imports
  `torch._C._distributed_c10d`.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def softmax_backward(gradient: Tensor, probabilities: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the scores in the last dimension, given that of their softmax."""
    return torch._softmax_backward_data(gradient, probabilities, -1, dtype)


def silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x, given that of silu(x)."""
    out: Tensor = torch.ops.aten.silu_backward(gradient, x)
    return out


def gelu_backward(gradient: Tensor, x: Tensor, *, approximate: str) -> Tensor:
    """Return the gradient of x, given that of gelu(x)."""
    out: Tensor = torch.ops.aten.gelu_backward(gradient, x, approximate=approximate)
    return out


def has_bfloat16_matmul() -> bool:
    """Tell whether oneDNN multiplies bfloat16 on this CPU."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, window: int | None, scale: float
) -> Tensor:
    """Return the causal attention of packed sequences, which start and end at `bounds`, on a GPU."""
    limits = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    out: Tensor
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=scale, **limits
    )
    return out


def prepack_half(weight: Tensor) -> Any:
    """Pack a float32 weight (out, in) in float16, as FBGEMM reads it."""
    return torch.ops.quantized.linear_prepack_fp16(weight, None)


def multiply_half(x: Tensor, packed: Any) -> Tensor:
    """Return x W^T in float32 for a weight that `prepack_half` packed."""
    out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, packed)
    return out


def unpack_half(packed: Any) -> Tensor:
    """Return a weight (out, in) that `prepack_half` packed, in float32."""
    weight: Tensor = torch.ops.quantized.linear_unpack_fp16(packed)[0]
    return weight.float()


def dynamic_shapes() -> AbstractContextManager[Any]:
    """Return a context in which torch.compile takes every size for one that changes."""
    context: AbstractContextManager[Any] = torch._dynamo.config.patch(assume_static_by_default=False)
    return context


def dynamo_error() -> type[Exception]:
    """Return what torch.compile raises; only a program that compiles imports the module."""
    error: type[Exception] = torch._dynamo.exc.TorchDynamoException
    return error


def is_missing_compiler(error: Exception) -> bool:
    """Tell whether inductor found no C++ compiler."""
    return isinstance(error, torch._inductor.exc.InvalidCxxCompiler)


def inductor_cache() -> Path:
    """Return the folder of what inductor compiled for this and other processes."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # takes a second

    return Path(cache_dir())
