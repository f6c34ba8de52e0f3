"""Rotary position embeddings."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Rope(NamedTuple):
    """The rotation of every position, for the leading dimensions of a head (Su et al. 2021, eq. 34)."""

    cos: Tensor
    """Cosines of the angles (T, 1, dim), each for both elements of a pair."""
    sin: Tensor
    """Their sines, negative for the first element of a pair."""
    interleaved: bool = False
    """Whether a pair is (2i, 2i + 1), and not (i, i + dim / 2)."""
    query_scale: Tensor | None = None
    """Factors of the rotated queries (T, 1, 1)."""


def turns(
    angles: Tensor,
    dtype: torch.dtype,
    factor: float = 1.0,
    interleaved: bool = False,
    query_scale: Tensor | None = None,
) -> Rope:
    """Return the rotation by some angles (T, dim / 2), whose result is multiplied by a factor."""
    cos, sin = ((t * factor).to(dtype)[:, None] for t in (angles.cos(), angles.sin()))
    scale = None if query_scale is None else query_scale.to(dtype)[:, None, None]
    return Rope(_joined(cos, cos, interleaved), _joined(-sin, sin, interleaved), interleaved, scale)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate each pair of the leading dimensions of x (T, heads, head_dim) by its angle; the others stay."""
    if not torch.is_grad_enabled():
        return _turned(x, rope.cos, rope.sin, rope.interleaved)  # for a single token, autograd's overhead is as long
    out: Tensor = _Rotation.apply(x, rope.cos, rope.sin, rope.interleaved)  # type: ignore[no-untyped-call]
    return out


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient is the inverse rotation: only the angles are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turned(x, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin, ctx.interleaved), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if (dim := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((_turned(x[..., :dim], cos, sin, interleaved), x[..., dim:]), dim=-1)
    if torch.compiler.is_compiling():  # in-place writes would be recomputed at every read
        (a, b), (c, _), (_, s) = (_pairs(t, interleaved) for t in (x, cos, sin))
        return _joined(a * c - b * s, b * c + a * s, interleaved).to(x.dtype)
    out = (x * cos).to(x.dtype)
    a, b = _pairs(x, interleaved)
    for element, other, sine in zip(_pairs(out, interleaved), (b, a), _pairs(sin, interleaved), strict=True):
        element.addcmul_(other, sine)
    return out


def _pairs(t: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return the first and the second elements of all pairs, as views."""
    if interleaved:
        return t[..., ::2], t[..., 1::2]
    first, second = t.chunk(2, dim=-1)
    return first, second


def _joined(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    """Undo `_pairs`."""
    return torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), dim=-1)
