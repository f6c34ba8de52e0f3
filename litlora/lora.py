"""LoRALinear, add_lora: the LoRA-aware linear layer and how it enters a model."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from litlora.linear import frozen_linear

# Which layers each --lora_* switch adapts, by the last part of their names.
TARGET_MODULES: dict[str, tuple[str, ...]] = {
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "projection": ("o_proj",),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "head": ("lm_head",),
}


@dataclass(frozen=True)
class LoRAConfig:
    """Shape and reach of an adapter; the names are those of PEFT's adapter_config.json."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...] | str
    """Last parts of layer names, or a regular expression for whole names."""
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """Factor of the low-rank branch: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def targets(self, name: str) -> bool:
        """Tell whether the layer of this name is adapted."""
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in self.target_modules)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank branch, W x + scaling · B A x (Hu et al. 2021, eq. 3).

    The frozen weight keeps its name, and the branch has PEFT's. A (r, in) and B (out, r) are float32 whatever the
    weight's precision is: steps far smaller than the weights must not round to nothing.
    """

    def __init__(self, linear: nn.Linear, *, rank: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.weight = linear.weight
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, dtype=torch.float32)
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)  # so that before the first step the model equals its base exactly
        self.to(linear.weight.device)  # only now, so that a seed gives the same start on every device

    def forward(self, x: Tensor) -> Tensor:
        frozen = frozen_linear(x, self.weight)
        branch = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))) * self.scaling)
        # In place: a bfloat16 sum is rounded once, stays bfloat16, and needs no second output.
        return frozen.add_(branch)


@torch.no_grad()
def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return W + scaling · B A (out, in) in the dtype of W; the sum is taken in float32, or small updates vanish."""
    return (weight.float() + scaling * (lora_b.float() @ lora_a.float())).to(weight.dtype)


def add_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Freeze the model and put a LoRALinear in the place of each layer that the config targets."""
    model.requires_grad_(False)
    for name in adapted_names(model, config):
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = LoRALinear(linear, rank=config.r, scaling=config.scaling, dropout=config.lora_dropout)
        setattr(model.get_submodule(parent), child, layer)


def adapted_names(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the names of the linear layers that the config targets, in the model's order."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and config.targets(name)]


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's matrices by name: `<layer>.lora_A.weight` and `<layer>.lora_B.weight`."""
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def count(parameters: Iterable[nn.Parameter], *, trainable: bool) -> int:
    """Count the trainable, or the frozen, of some parameters."""
    return sum(p.numel() for p in parameters if p.requires_grad is trainable)
