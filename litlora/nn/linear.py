"""Linear layers with frozen weights."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.cpu.matmul import frozen_linear


class Linear(nn.Linear):
    """A linear layer without bias that is fast where it is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        return F.linear(x, self.weight) if trains else frozen_linear(x, self.weight)

    def completed(self, product: Tensor, x: Tensor) -> Tensor:
        """Return the output for x, given its product with the weight."""
        return product


class Completed(Protocol):
    """A layer whose output can be had from a product that was computed with others'."""

    weight: Any

    def completed(self, product: Tensor, x: Tensor) -> Tensor: ...


class Joint(nn.Module):
    """Linear layers of one input whose weights are one: a token at a time, a large product is faster than its parts.

    It is for inference alone, and takes the weights away from its layers.
    """

    def __init__(self, *layers: Completed) -> None:
        super().__init__()
        weights = [layer.weight for layer in layers]
        self.layers, self.sizes = layers, [len(weight) for weight in weights]
        self.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
        for layer in layers:
            layer.weight = None

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the output (T, out) of each layer."""
        products = torch.split(frozen_linear(x, self.weight), self.sizes, dim=1)
        return [layer.completed(product, x) for layer, product in zip(self.layers, products, strict=True)]
