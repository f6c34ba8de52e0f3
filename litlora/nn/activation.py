"""Activations of the MLP, gated or not, and the soft cap of scores."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from litlora.torch_private import gelu_backward, silu_backward


@dataclass(frozen=True)
class Activation:
    """A function of each element, and the gradient of its input given that of its output and the input."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "silu": Activation(F.silu, silu_backward),
    "gelu": Activation(F.gelu, partial(gelu_backward, approximate="none")),
    "gelu_tanh": Activation(partial(F.gelu, approximate="tanh"), partial(gelu_backward, approximate="tanh")),
}


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return activation(gate) * up (Shazeer 2020)."""
    if not torch.is_grad_enabled():
        return activation.forward(gate).mul_(up)
    out: Tensor = _Gated.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return out


class _Gated(torch.autograd.Function):
    """activation(gate) * up, which saves only gate and up for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation.forward(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (gate, up), activation = ctx.saved_tensors, ctx.activation
        return activation.backward(gradient * up, gate), activation.forward(gate).mul_(gradient), None


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """Return cap * tanh(x / cap), or x without a cap (Gemma 2, arXiv 2408.00118, section 2)."""
    return x if cap is None else (x / cap).tanh() * cap
