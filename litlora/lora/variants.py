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
from litlora.nn.backend import without_autocast
from litlora.nn.backend_interface import FLOAT32, FrozenWeight
from litlora.nn.dropout import Dropout, apply_dropout
from litlora.nn.linear import frozen_linear

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
ROWS = 512
"""Rows of a weight that exist in float32 at one time; a multiple of what NF4 reads at once."""


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
    start: tuple[Tensor, Tensor] | None = None
    """A and B at the first step, if the weight is without their product (PiSSA)."""
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


class DoRA(LoRA):
    """g (W + scaling · B A) x, where g = m / ‖W + scaling · B A‖ by rows (Liu et al. 2024, arXiv 2402.09353, eq. 5).

    As in PEFT, the norms are constants to the gradient (section 4.3), and dropout acts on all that g scales beyond 1:
    W x + (g - 1) W dropout(x) + g · scaling · B A dropout(x).
    """

    names = (*LoRA.names, MAGNITUDE)

    @torch.no_grad()
    def init(self, layer: AdapterLayer) -> None:
        """Start with the norms of the weight as it is, so that g is 1."""
        if MAGNITUDE not in layer._parameters:
            layer.register_parameter(MAGNITUDE, nn.Parameter(torch.empty_like(layer.lora_B.weight[:, 0])))
        if layer.weight.device != torch.device("meta"):
            layer.get_parameter(MAGNITUDE).copy_(_row_norms(layer))

    @torch.no_grad()
    def freeze(self, layer: AdapterLayer) -> None:
        if layer.frozen is None:
            layer.frozen = self._scale_and_shift(layer)

    def forward(self, layer: AdapterLayer, base_output: Tensor, x: Tensor) -> Tensor:
        a, b = layer.lora_A.weight, layer.lora_B.weight
        (scale, shift), dropout = layer.frozen or self._scale_and_shift(layer), layer.draw_dropout()
        if not dropout.dropped:
            out = add_low_rank(base_output, x, a, b, layer.scaling, dropout) * scale
            return (out if shift is None else out + shift).to(base_output.dtype)
        product = frozen_linear(apply_dropout(x, dropout), layer.weight)
        rest = base_output - product
        scaled = add_low_rank(product, x, a, b, layer.scaling, dropout) * scale
        return (rest + scaled).to(base_output.dtype)

    def _scale_and_shift(self, layer: AdapterLayer) -> tuple[Tensor, Tensor | None]:
        """Return g (out,), and what undoes that the bias in the base's output is scaled by g."""
        scale = layer.get_parameter(MAGNITUDE) / _row_norms(layer)
        return scale, None if layer.bias is None else (1 - scale) * layer.bias

    @torch.no_grad()
    def merge(self, weight: Tensor, tensors: Mapping[str, Tensor], scaling: float) -> Tensor:
        direction = super().merge(weight.float(), tensors, scaling)
        scale = tensors[MAGNITUDE].float() / direction.square().sum(dim=1).sqrt()
        return (scale[:, None] * direction).to(weight.dtype)

    def saved_bytes(self, layer: AdapterLayer, tokens: int, itemsize: int) -> int:
        out = layer.lora_B.out_features
        return super().saved_bytes(layer, tokens, itemsize) + tokens * out * itemsize + 2 * out * FLOAT32

    def extra_products(self, layer: AdapterLayer) -> int:
        return int(layer.dropout > 0)

    def widest_temporary(self, layer: AdapterLayer) -> int:
        return max(layer.lora_A.in_features, layer.lora_B.out_features)


@torch.no_grad()
def _row_norms(layer: AdapterLayer) -> Tensor:
    """Return the norms (out,) of the rows of W + scaling · B A, a few rows of which exist at one time."""
    a, b = layer.lora_A.weight, layer.lora_B.weight
    with without_autocast(a):
        directions = (
            torch.addmm(_rows(layer.weight, rows).to(a.dtype), b[rows], a, alpha=layer.scaling)
            for rows in (slice(start, start + ROWS) for start in range(0, len(b), ROWS))
        )
        return torch.cat([direction.square().sum(dim=1).sqrt() for direction in directions])


def _rows(weight: Tensor | FrozenWeight, rows: slice) -> Tensor:
    return weight[rows] if isinstance(weight, Tensor) else weight.rows(rows)


def variant_of(config: LoRAConfig) -> Variant:
    """Return the variant that an adapter's configuration names."""
    return DoRA() if config.use_dora else LoRA()
