"""Rotary positions, and causal attention within each of the sequences that lie end to end in one row."""

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from litlora.kernels import writes_kernels
from litlora.linear import arithmetic, has_slow_products

BLOCK = 128
"""Queries whose scores exist at one time on a CPU: they stay in its cache, and little is computed that is masked."""

KEPT = 256
"""Keys that a block may see for its probabilities to be kept for its gradient, which else computes them again."""

ROWS, KEYS = 32, 64
"""Of what a block's queries and keys are a multiple in their gradients, where each shape of a product costs memory."""

Span = tuple[int, int]
"""How many keys of the sequence before it a sequence begins with, and how many positions it has of its own."""

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of every position's angles, each (T, 1, head_dim); the sines of the first half are negative."""


def turns(angles: Tensor, dtype: torch.dtype) -> Rope:
    """Return the rotation by some angles (T, head_dim / 2)."""
    cos, sin = (t.to(dtype)[:, None] for t in (angles.cos(), angles.sin()))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of x (T, heads, head_dim) by its angle (Su et al. 2021, eq. 34)."""
    if not torch.is_grad_enabled():
        return _turned(x, *rope)  # for a single token it takes no longer than the way to it through autograd
    out: Tensor = _Rotation.apply(x, *rope)  # type: ignore[no-untyped-call]
    return out


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient is the rotation back: nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # what is written in place would be computed again wherever it is read
        (a, b), (c, _), (_, s) = (t.chunk(2, dim=-1) for t in (x, cos, sin))
        return torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(x.dtype)
    out = (x * cos).to(x.dtype)
    for half, other, sine in zip(out.chunk(2, dim=-1), reversed(x.chunk(2, dim=-1)), sin.chunk(2, dim=-1), strict=True):
        half.addcmul_(other, sine)
    return out


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


def visible(T: int, S: int, window: int | None, device: torch.device) -> Tensor:
    """Which of S positions each of the last T sees, as a boolean mask (T, S)."""
    ones = torch.ones(T, S, dtype=torch.bool, device=device)
    mask = ones.tril(S - T)
    return mask if window is None else mask & ones.triu(S - T - window + 1)


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
