"""Variants of LoRA: what an adapter layer trains, what it computes, and how it is merged.

A new variant is a class here and a flag, which `variant_of` reads.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from litlora.lora.config import LoRAConfig
from litlora.lora.low_rank import add_low_rank
from litlora.nn.backend import FLOAT32
from litlora.nn.dropout import Dropout

A, B = "lora_A.weight", "lora_B.weight"


class AdapterLayer(nn.Module):
    """What a variant works on: a frozen linear layer and its low-rank pair."""

    weight: Any
    """Frozen, (out, in): a parameter, or a class that stores it otherwise; None once it is part of a joint weight."""
    bias: Tensor | None
    lora_A: nn.Linear  # noqa: N815 - PEFT's name
    lora_B: nn.Linear  # noqa: N815
    scaling: float
    dropout: float
    """Probability with which an element of the low-rank product's input is zeroed in training."""
    frozen: Any = None
    """What the variant has computed in `freeze`, where a layer no longer trains."""

    def draw_dropout(self) -> Dropout:
        """Draw the dropout of a forward pass, which drops nothing outside of training."""
        return Dropout.draw(self.dropout if self.training else 0.0)


class Variant(ABC):
    """One kind of adapter layer."""

    names: tuple[str, ...]
    """PEFT's names of what a layer trains."""

    def parameters(self, layer: AdapterLayer) -> dict[str, nn.Parameter]:
        """Return what the layer trains, by name."""
        return {name: layer.get_parameter(name) for name in self.names}

    @abstractmethod
    def init(self, layer: AdapterLayer) -> None:
        """Add, or set again, what a layer trains beside A and B, given these and the frozen weight."""

    @abstractmethod
    def freeze(self, layer: AdapterLayer) -> None:
        """Compute what stays constant once a layer no longer trains; its weight may then be stored elsewhere."""

    @abstractmethod
    def forward(self, layer: AdapterLayer, base_output: Tensor, x: Tensor) -> Tensor:
        """Return the output (T, out) for x (T, in), given that of the base layer, which may be overwritten."""

    @abstractmethod
    def merge(self, weight: Tensor, tensors: Mapping[str, Tensor], scaling: float) -> Tensor:
        """Return the weight (out, in), in its dtype, of a linear layer that computes the same as the adapter layer.

        `tensors` has what the layer trained, by name. Sums are taken in float32, or small updates would vanish.
        """

    @abstractmethod
    def saved_bytes(self, layer: AdapterLayer, tokens: int, itemsize: int) -> int:
        """Return the bytes that a forward pass saves beside its input, where a value of the output has `itemsize`."""

    @abstractmethod
    def extra_products(self, layer: AdapterLayer) -> int:
        """Return how many products with the frozen weight a forward pass in training has beside the base's own."""

    @abstractmethod
    def widest_temporary(self, layer: AdapterLayer) -> int:
        """Return the values for each token of the largest tensor that a backward pass needs in float32."""


class LoRA(Variant):
    """W x + scaling · B A x (Hu et al. 2021, arXiv 2106.09685, eq. 3)."""

    names: tuple[str, ...] = A, B

    def init(self, layer: AdapterLayer) -> None:
        """There is nothing beside A and B."""

    def freeze(self, layer: AdapterLayer) -> None:
        """There is nothing to compute from A and B."""

    def forward(self, layer: AdapterLayer, base_output: Tensor, x: Tensor) -> Tensor:
        a, b = layer.lora_A.weight, layer.lora_B.weight
        return add_low_rank(base_output, x, a, b, layer.scaling, layer.draw_dropout())

    @torch.no_grad()
    def merge(self, weight: Tensor, tensors: Mapping[str, Tensor], scaling: float) -> Tensor:
        a, b = tensors[A].float(), tensors[B].float()
        return (weight.float() + scaling * (b @ a)).to(weight.dtype)

    def saved_bytes(self, layer: AdapterLayer, tokens: int, itemsize: int) -> int:
        return tokens * layer.lora_A.out_features * FLOAT32

    def extra_products(self, layer: AdapterLayer) -> int:
        return 0

    def widest_temporary(self, layer: AdapterLayer) -> int:
        return layer.lora_A.in_features


def variant_of(config: LoRAConfig) -> Variant:
    """Return the variant that an adapter's configuration names."""
    return LoRA()
