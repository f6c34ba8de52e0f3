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
from torch.utils.checkpoint import checkpoint

from litlora.cpu.attention import visible
from litlora.cpu.onednn import has_slow_products
from litlora.nn.activation import softcap
from litlora.nn.attention_spec import AttentionSpec
from litlora.nn.transfer import copy_ahead
from litlora.torch_private import flash_attention

OPTIONS = {"window_size", "enable_gqa", "scale"}
"""What torch's attention of packed sequences must accept."""


@cache
def public_varlen_attention() -> Any:
    """Return torch's public attention of packed sequences, with windows and heads that share keys, or None.

    Only a GPU asks for it: the import brings torch's compiler with it, which takes seconds.
    """
    if find_spec("torch.nn.attention.varlen") is None:
        return None
    attention = import_module("torch.nn.attention.varlen").varlen_attn
    return attention if OPTIONS <= inspect.signature(attention).parameters.keys() else None


def attend(q: Tensor, k: Tensor, v: Tensor, *, spec: AttentionSpec) -> Tensor:
    """Causal attention of the last T positions of a sequence, of whose keys the first of them sees all S - T + 1.

    q is (n_head, T, head_dim), k and v are (n_kv, S, head_dim). Returns (n_head, T, head_dim).
    """
    on_cpu, window = q.device.type == "cpu", spec.window
    if on_cpu and has_slow_products(q.dtype):
        return attend(q.float(), k.float(), v.float(), spec=spec).to(q.dtype)
    T, S = q.shape[1], k.shape[1]
    fused = on_cpu and torch.compiler.is_compiling()
    if T == 1 and not fused and spec.softcap is None:
        # The heads of a group are to their keys what several queries would be.
        y = F.scaled_dot_product_attention(q.view(1, len(k), -1, q.shape[2]), k[None], v[None], scale=spec.scale)
        return y.reshape(q.shape)  # not all kernels of a GPU return the layout of their input
    k, v = (_repeat_heads(t, len(q) // len(t)) for t in (k, v))  # few kernels read the keys of a group as they are
    if T == 1 and fused:
        return _attend_one_query(q, k, v, spec)
    mask = visible(T, S, window, q.device) if S > T or (window is not None and T > window) else None
    if spec.softcap is not None:
        return _attend_with_softcap(q, k, v, spec, mask)
    options: dict[str, Any] = {"is_causal": mask is None, "scale": spec.scale}
    return F.scaled_dot_product_attention(q[None], k[None], v[None], mask, **options)[0]


def attend_each(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, spec: AttentionSpec) -> Tensor:
    """Let one query of each of B sequences see the positions that its mask (B, S) leaves.

    q is (B, n_head, head_dim), k and v are (B, n_kv, S, head_dim). Returns (B, n_head, head_dim).
    """
    if q.device.type == "cpu" and has_slow_products(q.dtype):
        return attend_each(q.float(), k.float(), v.float(), mask, spec).to(q.dtype)
    # The heads of a group are to their keys what several queries would be.
    groups, seen = q.view(len(q), k.shape[1], -1, q.shape[2]), mask[:, None, None]
    if spec.softcap is None:
        y = F.scaled_dot_product_attention(groups, k, v, seen, scale=spec.scale)
    else:
        y = _attend_with_softcap(groups, k, v, spec, seen)
    return y.reshape(q.shape)


def _attend_one_query(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Let one query (n_head, 1, head_dim) see all keys (n_head, S, head_dim), by loops that a compiler can fuse."""
    scores = softcap((q.float() * spec.scale * k.float()).sum(-1), spec.softcap)
    y: Tensor = (scores.softmax(-1)[..., None] * v.float()).sum(-2, keepdim=True)
    return y.to(q.dtype)


def _attend_with_softcap(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, mask: Tensor | None) -> Tensor:
    """Attend by the formula, since no kernel of torch has a softcap; without a mask, all positions are queries."""
    seen = visible(q.shape[1], k.shape[1], None, q.device) if mask is None else mask
    scores = softcap((q @ k.mT).float() * spec.scale, spec.softcap).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def _repeat_heads(t: Tensor, times: int) -> Tensor:
    """Repeat each head: (n_kv, S, head_dim) -> (n_kv * times, S, head_dim)."""
    return t[:, None].expand(-1, times, -1, -1).flatten(0, 1)


def sdpa_per_sequence(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], spec: AttentionSpec) -> Tensor:
    """Let each of the packed sequences attend to itself, one after the other: (T, heads, head_dim)."""
    sequences = zip(*(torch.split(t.transpose(0, 1), list(lengths), dim=1) for t in (q, k, v)), strict=True)
    attention = attend if spec.softcap is None else _attend_twice
    return torch.cat([attention(*sequence, spec=spec) for sequence in sequences], dim=1).transpose(0, 1)


def _attend_twice(q: Tensor, k: Tensor, v: Tensor, *, spec: AttentionSpec) -> Tensor:
    """Attend, and again in the backward pass, so that scores, which are quadratic in the length, are not saved."""
    out: Tensor = checkpoint(attend, q, k, v, spec=spec, use_reentrant=False, preserve_rng_state=False)
    return out


def varlen_flash_attention(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], spec: AttentionSpec) -> Tensor:
    """Let all packed sequences attend to themselves at once, by FlashAttention: (T, heads, head_dim)."""
    bounds, longest = _bounds(lengths, q.device), max(lengths)
    if (public := public_varlen_attention()) is None:
        return flash_attention(q, k, v, bounds, longest, spec.window, spec.scale)
    options: dict[str, Any] = {"window_size": (-1 if spec.window is None else spec.window - 1, 0), "scale": spec.scale}
    out: Tensor = public(q, k, v, bounds, bounds, longest, longest, enable_gqa=True, **options)
    return out


@lru_cache(maxsize=4)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where each sequence starts, and where the last ends: all blocks of a model need the same."""
    return copy_ahead([torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)], device)[0]
