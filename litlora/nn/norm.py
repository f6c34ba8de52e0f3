"""Norms with frozen weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich 2019) with a frozen weight, which is faster on CPU and equals torch's bit for bit.

    What is multiplied by is the weight plus `offset`: Gemma stores the difference from 1. A single row takes the time
    of its calls, and torch's own norm needs fewer.
    """

    def __init__(self, width: int, eps: float, offset: float = 0.0) -> None:
        super().__init__(width, eps)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or self.weight.requires_grad or len(x) == 1:
            return self._by_torch(x)
        out: Tensor = _RMSNorm.apply(x, self.weight, self.eps, self.offset)  # type: ignore[no-untyped-call]
        return out

    def _by_torch(self, x: Tensor) -> Tensor:
        if not self.offset:
            return super().forward(x)
        weight = self.weight.float() + self.offset
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x), computed in float32, times a frozen weight: saves x and one float per row for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return (wide * scale).mul_(_factors(weight, offset)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, weighted = x.float() * scale, gradient.float() * _factors(weight, ctx.offset)
        shared = torch.linalg.vecdot(normed, weighted)[..., None] / x.shape[-1]
        return weighted.addcmul_(normed, shared, value=-1).mul_(scale).to(x.dtype), None, None, None


def _factors(weight: Tensor, offset: float) -> Tensor:
    return weight.float() + offset if offset else weight.float()


class LayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016), whose result has the dtype of its input under autocast as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class NormOfEachHead(nn.Module):
    """A LayerNorm without bias for each head, with a weight of its own: StableLM's norm of queries and keys."""

    def __init__(self, heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm(head_dim, eps, bias=False) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        """Norm x (T, heads, head_dim)."""
        return torch.stack([norm(head) for norm, head in zip(self.norms, x.unbind(1), strict=True)], dim=1)
