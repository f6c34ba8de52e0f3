"""Exact causal attention on a CPU for packed sequences, in blocks of queries that stay in the cache."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from litlora.cpu.onednn import caches_kernels, matmul_dtype
from litlora.cpu.tuning import BLOCK, PAD_KEYS, PAD_QUERIES, RETAINED_KEYS
from litlora.torch_private import softmax_backward

Span = tuple[int, int]
"""The length of the prefix that a sequence shares with the one before it, and the number of its own positions."""


def visible(T: int, S: int, window: int | None, device: torch.device) -> Tensor:
    """Which of S positions each of the last T sees, as a boolean mask (T, S)."""
    ones = torch.ones(T, S, dtype=torch.bool, device=device)
    mask = ones.tril(S - T)
    return mask if window is None else mask & ones.triu(S - T - window + 1)


class Spec(Protocol):
    """What `nn.attention_spec.AttentionSpec` says of a layer."""

    @property
    def window(self) -> int | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], spec: Spec) -> Tensor:
    """Let every packed sequence attend to itself, causally, and to the prefix that it shares with the one before."""
    out: Tensor = _BlockedAttention.apply(q, k, v, spans, spec)  # type: ignore[no-untyped-call]
    return out


class _BlockedAttention(torch.autograd.Function):
    """Exact attention, one block of queries at a time.

    The output is computed in float32 whatever the inputs are, and rounded once; gradients are products of the inputs'
    dtype, where the CPU can multiply it. The heads of a group are stacked, so their keys and values are not repeated.
    Blocks that see few keys save their probabilities for the backward pass, others do not: memory is linear in T.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], spec: Spec) -> Tensor:
        ctx.spans, ctx.spec = spans, spec
        mask, (keys, values) = _block_mask(_group(q, k), tuple(spans), spec.window), (_seen(t, spans) for t in (k, v))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        saved: list[Tensor | None] = []
        for rows, seen in _blocks(spans, spec.window):
            probabilities, _ = _probabilities(_grouped(q[rows], k), _by_head(keys[seen]), mask, spec)
            out[rows] = _ungrouped(probabilities @ _by_head(values[seen]).float(), q[rows])
            saves = any(ctx.needs_input_grad) and saves_probabilities(probabilities.shape[2], spec)
            saved.append(_padded(probabilities, _group(q, k), q.dtype) if saves else None)
        ctx.save_for_backward(q, k, v, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, *saved), spans = ctx.saved_tensors, ctx.spans
        keys, values = (_seen(t, spans) for t in (k, v))
        q_gradient, *others = _gradients(gradient, q, keys, values, saved, spans, ctx.spec)
        return q_gradient, *(_summed(t, spans).to(k.dtype) for t in others), None, None


def saves_probabilities(keys: int, spec: Spec) -> bool:
    """Tell whether a block that sees a number of keys saves its probabilities for the backward pass.

    With a softcap, that needs the slope of each score as well, which follows from the products of queries and keys.
    """
    return keys <= RETAINED_KEYS and spec.softcap is None


def probability_bytes(heads: int, n_kv: int, spans: Sequence[Span], spec: Spec, dtype: torch.dtype) -> int:
    """Return the bytes of the probabilities that are saved for the backward pass."""
    group = heads // n_kv
    sizes = [((rows.stop - rows.start) * group, seen.stop - seen.start) for rows, seen in _blocks(spans, spec.window)]
    shapes = [_padded_shape(*size, group, dtype) for size in sizes if saves_probabilities(size[1], spec)]
    return sum(n_kv * rows * keys for rows, keys in shapes) * matmul_dtype(dtype).itemsize


def _padded_shape(rows: int, keys: int, group: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the rows and keys of a block in the backward pass, where oneDNN caches a kernel for each shape."""
    if not caches_kernels(dtype):
        return rows, keys
    return rows + -rows % (PAD_QUERIES * group), keys + -keys % PAD_KEYS


def _padded(probabilities: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Return a block's probabilities as the backward pass needs them: in the dtype of its products, and padded.

    Zeros stand for keys before the block's, and for queries after its own: whatever is there has no weight.
    """
    n_kv, rows, keys = probabilities.shape
    shape, product_dtype = _padded_shape(rows, keys, group, dtype), matmul_dtype(dtype)
    if shape == (rows, keys):
        return probabilities.to(product_dtype)
    padded = probabilities.new_empty(n_kv, *shape, dtype=product_dtype)
    padded[:, :rows, :-keys] = 0
    padded[:, :rows, -keys:] = probabilities
    padded[:, rows:] = 0
    return padded


def _seen(t: Tensor, spans: Sequence[Span]) -> Tensor:
    """Concatenate what each sequence sees: the prefix that it shares with the one before it, and its own positions."""
    indices = _seen_indices(tuple(spans))
    return t if indices is None else t[indices]


def _summed(gradient: Tensor, spans: Sequence[Span]) -> Tensor:
    """Return the gradient of the input of `_seen`: that of a shared prefix is summed over its sequences."""
    indices = _seen_indices(tuple(spans))
    if indices is None:
        return gradient
    return gradient.new_zeros(sum(own for _, own in spans), *gradient.shape[1:]).index_add_(0, indices, gradient)


@lru_cache(maxsize=4)
def _seen_indices(spans: tuple[Span, ...]) -> Tensor | None:
    """Return the positions in the packed sequence that each sequence sees, or None where no prefix is shared."""
    if not any(shared for shared, _ in spans):
        return None
    start, seen = 0, [torch.zeros(0, dtype=torch.long)]
    for shared, own in spans:
        seen.append(torch.cat([seen[-1][:shared], torch.arange(start, start + own)]))
        start += own
    return torch.cat(seen)


def _gradients(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: Sequence[Tensor | None],
    spans: Sequence[Span],
    spec: Spec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, and in float32 of the keys and values that they see, given the output's.

    Each block's probabilities are saved, or None. Zeros precede all keys, as the first block is padded as well.
    """
    mask, dtype = _block_mask(_group(q, k), tuple(spans), spec.window), matmul_dtype(q.dtype)
    before = PAD_KEYS - 1 if caches_kernels(q.dtype) else 0
    queries, gradient = q.to(dtype), gradient.to(dtype)
    # The scores' scale is in the values: what is smaller than scores is scaled once.
    keys, values = (F.pad(t.to(dtype), (0, 0, 0, 0, before, 0)) for t in (k, v.to(dtype) * spec.scale))
    q_gradient = torch.empty_like(q)
    k_gradient, v_gradient = (torch.zeros_like(t, dtype=torch.float32) for t in (keys, values))
    for (rows, own), probabilities in zip(_blocks(spans, spec.window), saved, strict=True):
        slope = None
        if probabilities is None:
            recomputed, slope = _probabilities(_grouped(q[rows], k), _by_head(k[own]), mask, spec)
            probabilities = _padded(recomputed, _group(q, k), q.dtype)
        seen = slice(own.stop + before - probabilities.shape[2], own.stop + before)
        here, upstream = (_grouped(t[rows], k, probabilities.shape[1]) for t in (queries, gradient))
        v_gradient[seen] += _by_head(probabilities.mT @ upstream)
        scores = softmax_backward(upstream @ _by_head(values[seen]).mT, probabilities, dtype)
        if slope is not None:
            scores[:, : slope.shape[1], -slope.shape[2] :] *= slope
        q_gradient[rows] = _ungrouped(scores @ _by_head(keys[seen]), q[rows])
        k_gradient[seen] += _by_head(scores.mT @ here)
    return q_gradient, k_gradient[before:], v_gradient[before:]


def _blocks(spans: Sequence[Span], window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yield the queries of each block, and the keys that at least one of them sees."""
    row = key = 0
    for shared, own in spans:
        for first in range(0, own, BLOCK):
            end = min(first + BLOCK, own)
            unseen = 0 if window is None else max(0, shared + first - window + 1)
            yield slice(row + first, row + end), slice(key + unseen, key + shared + end)
        row, key = row + own, key + shared + own


@lru_cache(maxsize=4)
def _block_mask(group: int, spans: tuple[Span, ...], window: int | None) -> Tensor:
    """Return what is added to the scores of the largest block; those of smaller ones are its last rows and columns."""
    longest = max(map(sum, spans))
    seen = visible(min(BLOCK, longest), longest, window, torch.device("cpu"))
    mask = torch.zeros_like(seen, dtype=torch.float32).masked_fill_(~seen, -torch.inf)
    return mask.repeat_interleave(group, dim=0)  # (block * group, keys)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor, spec: Spec) -> tuple[Tensor, Tensor | None]:
    """Return the weight of each key for each query (n_kv, block * group, keys), and the slope of a softcap there."""
    here = mask[-q.shape[1] :, -k.shape[1] :].expand(len(q), -1, -1)
    if spec.softcap is None:
        return torch.baddbmm(here, q.float(), k.float().mT, alpha=spec.scale).softmax(dim=-1), None
    bounded = (q.float() @ k.float().mT).mul_(spec.scale / spec.softcap).tanh_()
    return torch.add(here, bounded, alpha=spec.softcap).softmax(dim=-1), 1 - bounded.square()


def _group(q: Tensor, k: Tensor) -> int:
    return q.shape[1] // k.shape[1]  # heads that share their keys


def _grouped(q: Tensor, k: Tensor, rows: int | None = None) -> Tensor:
    """Stack the heads that share keys: (block, n_head, head_dim) -> (n_kv, block * group, head_dim).

    The result is padded with zeros to a number of rows, if one is given.
    """
    grouped = q.view(len(q), k.shape[1], -1, q.shape[-1]).transpose(0, 1).flatten(1, 2)
    more = 0 if rows is None else rows - grouped.shape[1]
    return F.pad(grouped, (0, 0, 0, more)) if more else grouped


def _ungrouped(y: Tensor, like: Tensor) -> Tensor:
    """Undo `_grouped`: (n_kv, rows, head_dim) -> (block, n_head, head_dim)."""
    heads = y.view(len(y), -1, like.shape[1] // len(y), y.shape[-1])
    return heads[:, : len(like)].transpose(0, 1).flatten(1, 2)


def _by_head(t: Tensor) -> Tensor:
    return t.transpose(0, 1)  # (keys, n_kv, head_dim) to (n_kv, keys, head_dim), and back
