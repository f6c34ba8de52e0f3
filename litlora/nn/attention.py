"""Attention by torch's own kernels: of new tokens over a KV cache, and of packed sequences on a GPU."""

import inspect
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litlora.cpu.attention import visible
from litlora.cpu.onednn import has_slow_products
from litlora.torch_private import flash_attention


@cache
def public_varlen_attention() -> Any:
    """Return torch's public attention of packed sequences, with windows and heads that share keys, or None.

    Only a GPU asks for it: the import brings torch's compiler with it, which takes seconds.
    """
    if find_spec("torch.nn.attention.varlen") is None:
        return None
    attention = import_module("torch.nn.attention.varlen").varlen_attn
    return attention if {"window_size", "enable_gqa"} <= inspect.signature(attention).parameters.keys() else None


def attend(q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
    """Causal attention of the last T positions of a sequence of S.

    q is (n_head, T, head_dim), k and v are (n_kv, S, head_dim). Returns (n_head, T, head_dim).
    """
    on_cpu = q.device.type == "cpu"
    if on_cpu and has_slow_products(q.dtype):
        return attend(q.float(), k.float(), v.float(), window=window).to(q.dtype)
    T, S = q.shape[1], k.shape[1]
    if window is not None and S > T + window - 1:
        first = S - (T + window - 1)  # no query sees the keys before
        k, v, S = k[:, first:], v[:, first:], T + window - 1
    fused = on_cpu and torch.compiler.is_compiling()
    if T == 1 and not fused:  # the heads of a group are to their keys what several queries would be
        y = F.scaled_dot_product_attention(q.view(1, len(k), -1, q.shape[2]), k[None], v[None])
        return y.reshape(q.shape)  # not all kernels of a GPU return the layout of their input
    k, v = (_repeat_heads(t, len(q) // len(t)) for t in (k, v))  # few kernels read the keys of a group as they are
    if T == 1:
        return _attend_one_query(q, k, v)
    masked = S > T or (window is not None and T > window)
    mask = visible(T, S, window, q.device) if masked else None
    return F.scaled_dot_product_attention(q[None], k[None], v[None], mask, is_causal=mask is None)[0]


def _attend_one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let one query (n_head, 1, head_dim) see all keys (n_head, S, head_dim), by loops that a compiler can fuse."""
    scores = (q.float() * q.shape[-1] ** -0.5 * k.float()).sum(-1)
    y: Tensor = (scores.softmax(-1)[..., None] * v.float()).sum(-2, keepdim=True)
    return y.to(q.dtype)


def _repeat_heads(t: Tensor, times: int) -> Tensor:
    """Repeat each head: (n_kv, S, head_dim) -> (n_kv * times, S, head_dim)."""
    return t[:, None].expand(-1, times, -1, -1).flatten(0, 1)


def sdpa_per_sequence(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None) -> Tensor:
    """Let each of the packed sequences attend to itself, one after the other: (T, heads, head_dim)."""
    sequences = zip(*(torch.split(t.transpose(0, 1), list(lengths), dim=1) for t in (q, k, v)), strict=True)
    return torch.cat([attend(*sequence, window=window) for sequence in sequences], dim=1).transpose(0, 1)


def varlen_flash_attention(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    """Let all packed sequences attend to themselves at once, by FlashAttention: (T, heads, head_dim)."""
    bounds, longest = _bounds(lengths, q.device), max(lengths)
    if (public := public_varlen_attention()) is None:
        return flash_attention(q, k, v, bounds, longest, window)
    limits = (-1 if window is None else window - 1, 0)
    out: Tensor = public(q, k, v, bounds, bounds, longest, longest, window_size=limits, enable_gqa=True)
    return out


@lru_cache(maxsize=4)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where each sequence starts, and where the last ends: all blocks of a model need the same."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
