"""Exact causal attention on a CPU for packed sequences, in blocks of queries that stay in the cache."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from litlora.cpu.onednn import arithmetic, writes_kernels

BLOCK = 128
"""Queries whose scores exist at one time on a CPU: they stay in its cache, and little is computed that is masked."""

KEPT = 256
"""Keys that a block may see for its probabilities to be kept for its gradient, which else computes them again."""

ROWS, KEYS = 32, 64
"""Of what a block's queries and keys are a multiple in their gradients, where each shape of a product costs memory."""

Span = tuple[int, int]
"""How many keys of the sequence before it a sequence begins with, and how many positions it has of its own."""


def visible(T: int, S: int, window: int | None, device: torch.device) -> Tensor:
    """Which of S positions each of the last T sees, as a boolean mask (T, S)."""
    ones = torch.ones(T, S, dtype=torch.bool, device=device)
    mask = ones.tril(S - T)
    return mask if window is None else mask & ones.triu(S - T - window + 1)


class _BlockedAttention(torch.autograd.Function):
    """Exact attention on a CPU, one block of queries at a time.

    The output is computed in float32 whatever the inputs are, and rounded once; gradients are products of the inputs'
    dtype, where a CPU can multiply it. The heads of a group stand below each other, so their keys and values are not
    repeated. Blocks that see few keys keep their probabilities for their gradients, others do not: memory grows with
    T alone.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], window: int | None) -> Tensor:
        ctx.spans, ctx.window = spans, window
        mask, (keys, values) = _block_mask(_group(q, k), tuple(spans), window), (_seen(t, spans) for t in (k, v))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        kept: list[Tensor | None] = []
        for rows, seen in _blocks(spans, window):
            probabilities = _probabilities(_grouped(q[rows], k), _by_head(keys[seen]), mask)
            out[rows] = _ungrouped(probabilities @ _by_head(values[seen]).float(), q[rows])
            keeps = any(ctx.needs_input_grad) and probabilities.shape[2] <= KEPT
            kept.append(_filled(probabilities, _group(q, k), q.dtype) if keeps else None)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, *kept), spans = ctx.saved_tensors, ctx.spans
        keys, values = (_seen(t, spans) for t in (k, v))
        q_gradient, *others = _gradients(gradient, q, keys, values, kept, spans, ctx.window)
        return q_gradient, *(_summed(t, spans).to(k.dtype) for t in others), None, None


def probability_bytes(
    heads: int, n_kv: int, spans: Sequence[Span], window: int | None, dtype: torch.dtype, device: torch.device
) -> int:
    """Return the bytes of the probabilities that a CPU keeps for gradients."""
    group = heads // n_kv
    sizes = [((rows.stop - rows.start) * group, seen.stop - seen.start) for rows, seen in _blocks(spans, window)]
    shapes = [_suited_shape(*size, group, dtype, device) for size in sizes if size[1] <= KEPT]
    return sum(n_kv * rows * keys for rows, keys in shapes) * arithmetic(dtype, device).itemsize


def _suited_shape(rows: int, keys: int, group: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Return to how many rows and keys a block is filled up for its gradients."""
    if not writes_kernels(dtype, device):
        return rows, keys
    return rows + -rows % (ROWS * group), keys + -keys % KEYS


def _filled(probabilities: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Return a block's probabilities as its gradients need them: in the dtype of their products, and filled up.

    Zeros stand for keys before the block's, and for queries behind them: whatever there is has no weight.
    """
    device, (n_kv, rows, keys) = probabilities.device, probabilities.shape
    suited, needed = _suited_shape(rows, keys, group, dtype, device), arithmetic(dtype, device)
    if suited == (rows, keys):
        return probabilities.to(needed)
    filled = probabilities.new_empty(n_kv, *suited, dtype=needed)
    filled[:, :rows, :-keys] = 0
    filled[:, :rows, -keys:] = probabilities
    filled[:, rows:] = 0
    return filled


def _seen(t: Tensor, spans: Sequence[Span]) -> Tensor:
    """Lay end to end what each sequence sees: behind what it shares with the one before it, its own."""
    places = _places(tuple(spans))
    return t if places is None else t[places]


def _summed(gradient: Tensor, spans: Sequence[Span]) -> Tensor:
    """Undo `_seen` for its gradient: what sequences share has that of all of them."""
    places = _places(tuple(spans))
    if places is None:
        return gradient
    return gradient.new_zeros(sum(own for _, own in spans), *gradient.shape[1:]).index_add_(0, places, gradient)


@lru_cache(maxsize=4)
def _places(spans: tuple[Span, ...]) -> Tensor | None:
    """Return where in the row each sequence finds the keys that it sees, or None where none shares any."""
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
    kept: Sequence[Tensor | None],
    spans: Sequence[Span],
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, and in float32 of the keys and values that they see, given the output's.

    Each block's probabilities are kept, or None. Before all keys stand zeros, for the first block is filled up as well.
    """
    mask, dtype = _block_mask(_group(q, k), tuple(spans), window), arithmetic(q.dtype, q.device)
    before = KEYS - 1 if writes_kernels(q.dtype, q.device) else 0
    queries, gradient = q.to(dtype), gradient.to(dtype)
    # The scores' scale is in the values: what is smaller than scores is scaled once.
    keys, values = (F.pad(t.to(dtype), (0, 0, 0, 0, before, 0)) for t in (k, v.to(dtype) * q.shape[-1] ** -0.5))
    q_gradient = torch.empty_like(q)
    k_gradient, v_gradient = (torch.zeros_like(t, dtype=torch.float32) for t in (keys, values))
    for (rows, own), probabilities in zip(_blocks(spans, window), kept, strict=True):
        if probabilities is None:
            again = _probabilities(_grouped(q[rows], k), _by_head(k[own]), mask)
            probabilities = _filled(again, _group(q, k), q.dtype)
        seen = slice(own.stop + before - probabilities.shape[2], own.stop + before)
        here, upstream = (_grouped(t[rows], k, probabilities.shape[1]) for t in (queries, gradient))
        v_gradient[seen] += _by_head(probabilities.mT @ upstream)
        scores = torch._softmax_backward_data(upstream @ _by_head(values[seen]).mT, probabilities, -1, dtype)
        q_gradient[rows] = _ungrouped(scores @ _by_head(keys[seen]), q[rows])
        k_gradient[seen] += _by_head(scores.mT @ here)
    return q_gradient, k_gradient[before:], v_gradient[before:]


def _blocks(spans: Sequence[Span], window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yield the queries of each block, and of all that is seen the keys that at least one of them sees."""
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


def _probabilities(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Return the weight of each key for each query (n_kv, block * group, keys)."""
    here = mask[-q.shape[1] :, -k.shape[1] :].expand(len(q), -1, -1)
    return torch.baddbmm(here, q.float(), k.float().mT, alpha=q.shape[-1] ** -0.5).softmax(dim=-1)


def _group(q: Tensor, k: Tensor) -> int:
    return q.shape[1] // k.shape[1]  # heads that share their keys


def _grouped(q: Tensor, k: Tensor, rows: int | None = None) -> Tensor:
    """Put the heads that share keys below each other: (block, n_head, head_dim) -> (n_kv, block * group, head_dim).

    Zeros may follow, up to so many rows.
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
