"""Causal attention of packed sequences, and of new tokens over a KV cache."""

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from litlora.cpu.attention import Span, _BlockedAttention, visible
from litlora.cpu.onednn import has_slow_products


def attend_within(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], window: int | None) -> Tensor:
    """Let every sequence attend to itself, causally, and to nothing of its neighbours but what it shares with them.

    q is (T, n_head, head_dim), k and v are (T, n_kv, head_dim); with a window, a query sees its own position and the
    window - 1 before it. Returns (T, n_head, head_dim). Only a CPU's sequences can share anything.
    """
    if q.device.type == "cpu":
        out: Tensor = _BlockedAttention.apply(q, k, v, spans, window)  # type: ignore[no-untyped-call]
        return out
    lengths = [own for _, own in spans]
    assert sum(map(sum, spans)) == sum(lengths)
    if _has_flash_attention(q.device, q.dtype, q.shape[2]):
        return _flash_attention(q, k, v, lengths, window)
    parts = zip(*(torch.split(t.transpose(0, 1), lengths, dim=1) for t in (q, k, v)), strict=True)
    return torch.cat([attend(*part, window=window) for part in parts], dim=1).transpose(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
    """Causal attention of the last T positions of a sequence of S.

    q is (n_head, T, head_dim), k and v are (n_kv, S, head_dim). Returns (n_head, T, head_dim).
    """
    if has_slow_products(q.dtype, q.device):
        return attend(q.float(), k.float(), v.float(), window=window).to(q.dtype)
    T, S = q.shape[1], k.shape[1]
    if window is not None and S > T + window - 1:
        first = S - (T + window - 1)  # no query sees what lies before
        k, v, S = k[:, first:], v[:, first:], T + window - 1
    fused = torch.compiler.is_compiling() and q.device.type == "cpu"
    if T == 1 and not fused:  # the heads of a group are to their keys what several queries would be
        y = F.scaled_dot_product_attention(q.view(1, len(k), -1, q.shape[2]), k[None], v[None])
        return y.reshape(q.shape)  # not all kernels of a GPU return the layout of their input
    k, v = (_repeated(t, len(q) // len(t)) for t in (k, v))  # few kernels read the keys of a group as they are
    if T == 1:
        return _attended(q, k, v)
    masked = S > T or (window is not None and T > window)
    mask = visible(T, S, window, q.device) if masked else None
    return F.scaled_dot_product_attention(q[None], k[None], v[None], mask, is_causal=mask is None)[0]


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let one query (n_head, 1, head_dim) see all keys (n_head, S, head_dim), by loops that a compiler can fuse."""
    scores = (q.float() * q.shape[-1] ** -0.5 * k.float()).sum(-1)
    y: Tensor = (scores.softmax(-1)[..., None] * v.float()).sum(-2, keepdim=True)
    return y.to(q.dtype)


def _repeated(t: Tensor, times: int) -> Tensor:
    """Repeat each head: (n_kv, S, head_dim) -> (n_kv * times, S, head_dim)."""
    return t[:, None].expand(-1, times, -1, -1).flatten(0, 1)


@cache
def _has_flash_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Tell whether a GPU has FlashAttention's kernels (Dao 2023) for values of this dtype and heads of this width."""
    fits = dtype is torch.bfloat16 and head_dim % 8 == 0 and head_dim <= 256
    return fits and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None) -> Tensor:
    """Let all sequences attend to themselves at once; the heads of a group read their keys where they are."""
    bounds, longest = _bounds(tuple(lengths), q.device), max(lengths)
    seen = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    out: Tensor
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, True, False, **seen
    )
    return out


@lru_cache(maxsize=4)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where each sequence begins, and where the last ends: all blocks of a model ask for the same."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
