"""Linear layers with frozen weights and biases."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.nn.backend import backend
from litlora.nn.backend_interface import FrozenWeight


def frozen_linear(x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b (T, out) for x (T, in), and a weight (out, in) and bias (out,) that need no gradient."""
    return backend(x.device).linear(x, weight, bias) if isinstance(weight, Tensor) else weight.matmul(x, bias)


class Linear(nn.Linear):
    """A linear layer that is fast where it is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (self.weight.requires_grad or _requires_grad(self.bias)):
            return F.linear(x, self.weight, self.bias)
        return frozen_linear(x, self.weight, self.bias)

    def completed(self, product: Tensor, x: Tensor) -> Tensor:
        """Return the output for x, given x W^T + b."""
        return product


def _requires_grad(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


class Completed(Protocol):
    """A layer whose output can be computed from a product that it shares with others."""

    weight: Any
    bias: Any

    def completed(self, product: Tensor, x: Tensor) -> Tensor: ...


class Joint(nn.Module):
    """Linear layers of one input, joined in one weight and one bias: for one token, a large product is faster.

    It is for inference alone, and takes weights and biases away from its layers.
    """

    def __init__(self, *layers: Completed) -> None:
        super().__init__()
        weights = [layer.weight for layer in layers]
        self.layers, self.sizes = layers, [len(weight) for weight in weights]
        self.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
        self.bias = _joined_bias(layers)
        for layer in layers:
            layer.weight = layer.bias = None

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the output (T, out) of each layer."""
        products = torch.split(frozen_linear(x, self.weight, self.bias), self.sizes, dim=1)
        return [layer.completed(product, x) for layer, product in zip(self.layers, products, strict=True)]


def _joined_bias(layers: Sequence[Completed]) -> nn.Parameter | None:
    """Return the biases end to end, with zeros for a layer without one, or None where no layer has any."""
    if all(layer.bias is None for layer in layers):
        return None
    biases = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
    return nn.Parameter(torch.cat(biases), requires_grad=False)
