"""The LoRA layer, and adding LoRA layers to a model."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from litlora.lora.config import LayerSettings, LoRAConfig
from litlora.lora.variants import A, AdapterLayer, B, LoRA, Variant, variant_of
from litlora.models.transformer import GPT
from litlora.nn.linear import frozen_linear
from litlora.nn.quantization import QuantizedLinear, StoredWeight


class LoRALinear(AdapterLayer):
    """A frozen linear layer with a trainable low-rank pair A, B, whose variant decides what is computed with them.

    The frozen weight keeps its name, and the pair has PEFT's. A (r, in) and B (out, r) are float32 whatever the
    weight's precision is: steps far smaller than the weights must not round to nothing.
    """

    def __init__(
        self,
        linear: nn.Linear | QuantizedLinear,
        *,
        rank: int,
        scaling: float,
        dropout: float,
        variant: Variant | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, dtype=torch.float32)
        self.scaling, self.dropout, self.variant = scaling, dropout, variant or LoRA()
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)  # so that before the first step the model equals its base exactly
        for matrix in (self.lora_A, self.lora_B):
            matrix.to(device or linear.weight.device)  # after drawing, so that a seed gives the same start everywhere
        self.variant.init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.completed(frozen_linear(x, self.weight, self.bias), x)

    def completed(self, product: Tensor, x: Tensor) -> Tensor:
        """Return the output for x, given that of the base layer, which is overwritten."""
        return self.variant.forward(self, product, x)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return what this layer trains, by PEFT's names."""
        return self.variant.parameters(self)

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return by PEFT's names what a file has of this layer, which fits the base itself.

        Where the base lacks the start A₀, B₀, that is [A; A₀] and [B, -B₀]: their product is B A - B₀ A₀.
        """
        tensors: dict[str, Tensor] = {name: p.detach() for name, p in self.adapter_parameters().items()}
        if self.start is not None:
            a, b = self.start
            tensors |= {A: torch.cat([tensors[A], a]), B: torch.cat([tensors[B], -b], dim=1)}
        return tensors

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo `saved_tensors`."""
        own, rank = dict(tensors), self.lora_A.out_features
        if self.start is not None:
            a, b = self.start
            a.copy_(own[A][rank:])
            b.copy_(-own[B][:, rank:])
            own |= {A: own[A][:rank], B: own[B][:, :rank]}
        for name, parameter in self.adapter_parameters().items():
            parameter.copy_(own[name])


def add_lora(model: GPT, config: LoRAConfig, device: torch.device | None = None) -> None:
    """Freeze the model and replace each layer that the config targets by a LoRALinear.

    The adapter is on its base's device unless another is given, as for a base whose weights are loaded later.
    """
    add_layers(model, config.adapted(linear_layers(model)), variant_of(config), config.lora_dropout, device)
    for layer in lora_layers(model).values() if config.changes_base else ():
        layer.start = (torch.zeros_like(layer.lora_A.weight), torch.zeros_like(layer.lora_B.weight))


def add_layers(
    model: GPT,
    layers: Mapping[str, LayerSettings],
    variant: Variant,
    dropout: float = 0.0,
    device: torch.device | None = None,
) -> None:
    """Freeze the model and replace the layers of these names, which are PEFT's, by LoRALinear layers."""
    model.requires_grad_(False)
    linears = linear_layers(model)
    for hub_name, settings in layers.items():
        name = linears[hub_name]
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear | QuantizedLinear)
        shape: dict[str, Any] = {"rank": settings.rank, "scaling": settings.scaling, "dropout": dropout}
        layer = LoRALinear(linear, **shape, variant=variant, device=device)
        setattr(model.get_submodule(parent), child, layer)


def linear_layers(model: GPT) -> dict[str, str]:
    """Return the names of the linear layers by PEFT's names of them, in the model's order."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | QuantizedLinear)]
    return {model.config.hub_name(name): name for name in names}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapter layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: GPT) -> dict[str, nn.Parameter]:
    """Return what the adapter layers train, by PEFT's names: `<layer>.lora_A.weight` and so on."""
    layers = lora_layers(model).items()
    name_of = model.config.hub_name
    return {f"{name_of(name)}.{key}": p for name, layer in layers for key, p in layer.adapter_parameters().items()}


def saved_tensors(model: GPT) -> dict[str, Tensor]:
    """Return what the adapter's file has, by PEFT's names."""
    name_of = model.config.hub_name
    layers = lora_layers(model).items()
    return {f"{name_of(name)}.{key}": t for name, layer in layers for key, t in layer.saved_tensors().items()}


def freeze_adapter(model: nn.Module) -> None:
    """Prepare adapter layers for inference alone."""
    for layer in lora_layers(model).values():
        layer.variant.freeze(layer)


def count(model: GPT, *, trainable: bool) -> int:
    """Count the trainable, or the frozen, weights of a model; a byte of a stored weight may hold two."""
    adapter = {id(p) for p in lora_parameters(model).values()}
    if trainable:
        return sum(p.numel() for p in model.parameters() if id(p) in adapter)
    stored = [module for module in model.modules() if isinstance(module, StoredWeight)]
    parts = adapter | {id(p) for weight in stored for p in weight.parameters()}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in parts)
    return dense + sum(weight.shape.numel() for weight in stored)
