"""Rotary position embeddings."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of every position's angles, each (T, 1, head_dim); the sines of the first half are negative."""


def turns(angles: Tensor, dtype: torch.dtype) -> Rope:
    """Return the rotation by some angles (T, head_dim / 2)."""
    cos, sin = (t.to(dtype)[:, None] for t in (angles.cos(), angles.sin()))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate each pair (i, i + head_dim / 2) of x (T, heads, head_dim) by its angle (Su et al. 2021, eq. 34)."""
    if not torch.is_grad_enabled():
        return _turned(x, *rope)  # for a single token, autograd's overhead is as long
    out: Tensor = _Rotation.apply(x, *rope)  # type: ignore[no-untyped-call]
    return out


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient is the inverse rotation: only the angles are saved."""

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
    if torch.compiler.is_compiling():  # in-place writes would be recomputed at every read
        (a, b), (c, _), (_, s) = (t.chunk(2, dim=-1) for t in (x, cos, sin))
        return torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(x.dtype)
    out = (x * cos).to(x.dtype)
    for half, other, sine in zip(out.chunk(2, dim=-1), reversed(x.chunk(2, dim=-1)), sin.chunk(2, dim=-1), strict=True):
        half.addcmul_(other, sine)
    return out
