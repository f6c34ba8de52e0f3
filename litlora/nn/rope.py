"""Rotary position embeddings."""

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of every position's angles, each (T, 1, head_dim); the sines of the first half are negative."""


def turns(angles: Tensor, dtype: torch.dtype) -> Rope:
    """Return the rotation by some angles (T, head_dim / 2)."""
    cos, sin = (t.to(dtype)[:, None] for t in (angles.cos(), angles.sin()))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate each pair (i, i + head_dim / 2) of x (T, heads, head_dim) by its angle (Su et al. 2021, eq. 34)."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((second, first), dim=-1) * sin).to(x.dtype)  # which may be narrower than the angles
