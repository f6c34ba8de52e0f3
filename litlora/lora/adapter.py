"""An adapter in memory, read from one folder or the weighted sum of several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from litlora.lora.config import LayerSettings
from litlora.lora.layer import add_layers, freeze_adapter, lora_parameters
from litlora.lora.variants import A, B, LoRA, Variant
from litlora.models.transformer import GPT


@dataclass(frozen=True)
class Adapter:
    """What is added to a base."""

    layers: Mapping[str, LayerSettings]
    """The adapted layers, by their names in the base's checkpoint."""
    variant: Variant
    tensors: Mapping[str, Tensor]
    """What the layers have trained, by the layer's name and PEFT's: `<layer>.lora_A.weight` and so on."""

    has_starts: bool = False
    """Whether training began with the second half of each matrix (PiSSA), on a base that was quantized without it."""

    def start_of(self, layer: str) -> Tensor | None:
        """Return what the quantized weight (out, in) of a layer was without in training, if anything."""
        if not self.has_starts or layer not in self.layers:
            return None
        own, settings = self.of(layer), self.layers[layer]
        rank = settings.rank // 2
        return -settings.scaling * (own[B].float()[:, rank:] @ own[A].float()[rank:])

    def of(self, layer: str) -> dict[str, Tensor]:
        """Return the tensors of one layer by PEFT's names."""
        return {name: self.tensors[f"{layer}.{name}"] for name in self.variant.names}

    @torch.no_grad()
    def add_to(self, model: GPT) -> None:
        """Add the adapter to the model of its base, for inference."""
        add_layers(model, self.layers, self.variant)
        for name, parameter in lora_parameters(model).items():
            parameter.copy_(self.tensors[name])
        freeze_adapter(model)


def weighted_sum(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Return the LoRA adapter that adds the sum of weight · scaling · B A over these; ranks and layers may differ.

    The A of a layer, times weight and scaling, are stacked, and its B are put side by side: the sum is exact, and its
    rank the sum of the ranks.
    """
    layers: dict[str, LayerSettings] = {}
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for adapter, _ in adapters for name in adapter.layers):
        terms = [
            (adapter.of(name), w * adapter.layers[name].scaling) for adapter, w in adapters if name in adapter.layers
        ]
        tensors[f"{name}.{A}"] = a = torch.cat([factor * own[A].float() for own, factor in terms])
        tensors[f"{name}.{B}"] = torch.cat([own[B].float() for own, _ in terms], dim=1)
        layers[name] = LayerSettings(rank=len(a), scaling=1.0)
    return Adapter(layers, LoRA(), tensors)
