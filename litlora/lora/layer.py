"""The LoRA layer, and adding LoRA layers to a model."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from litlora.errors import LitLoraError
from litlora.lora.config import LoRAConfig
from litlora.nn.dropout import Dropout, masked
from litlora.nn.linear import frozen_linear
from litlora.nn.nf4 import NF4Linear
from litlora.utils.resource_limits import bounded


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank branch, W x + scaling · B A x (Hu et al. 2021, eq. 3).

    The frozen weight keeps its name, and the branch has PEFT's. A (r, in) and B (out, r) are float32 whatever the
    weight's precision is: steps far smaller than the weights must not round to nothing.
    """

    def __init__(self, linear: nn.Linear | NF4Linear, *, rank: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, dtype=torch.float32)
        self.scaling = scaling
        self.dropout = dropout
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)  # so that before the first step the model equals its base exactly

    def forward(self, x: Tensor) -> Tensor:
        return self.completed(frozen_linear(x, self.weight, self.bias), x)

    def completed(self, product: Tensor, x: Tensor) -> Tensor:
        """Return the output for x, given its product with the frozen weight, to which the branch is added in place."""
        a, b = self.lora_A.weight, self.lora_B.weight
        if not (self.training or torch.is_grad_enabled()):
            return _add_low_rank(product, x, a, b, self.scaling, None)[0]
        dropout = self.dropout if self.training else 0.0
        out: Tensor = _AddLowRank.apply(product, x, a, b, self.scaling, dropout)  # type: ignore[no-untyped-call]
        return out


def _add_low_rank(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, factor: float, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add factor · B A x to y in place, for what is kept of x; return it and the (T, r) product behind it."""
    with torch.autocast(x.device.type, enabled=False):
        low = F.linear(masked(x, kept).to(a.dtype), a).mul_(factor)
        # A bfloat16 sum is rounded once, and stays bfloat16.
        return (y.addmm_(low, b.t()) if y.dtype == b.dtype else y.add_(F.linear(low, b))), low


class _AddLowRank(torch.autograd.Function):
    """Add scaling · B A dropout(x) to y (T, out), in place, at the price of its arithmetic.

    Of x (T, in) nothing is kept but x itself, which other layers keep as well, and the seed of its dropout.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float) -> Tensor:
        ctx.dropout, ctx.scaling = Dropout.draw(dropout), scaling
        out, low = _add_low_rank(y, x, a, b, scaling * ctx.dropout.factor, ctx.dropout.mask(x))
        ctx.save_for_backward(x, a, b, low)
        ctx.mark_dirty(y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low = ctx.saved_tensors
        gradient, kept = y_gradient.to(b.dtype), ctx.dropout.mask(x)
        # Both factors of a product with few columns are read along their rows: a CPU then takes a third of the time.
        low_gradient = F.linear(gradient, b.t().contiguous()).mul_(ctx.scaling * ctx.dropout.factor)
        a_gradient = low_gradient.t() @ masked(x, kept).to(a.dtype)
        x_gradient = masked((low_gradient @ a).to(x.dtype), kept) if ctx.needs_input_grad[1] else None
        return y_gradient, x_gradient, a_gradient, (low.t() @ gradient).t(), None, None


@torch.no_grad()
def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return W + scaling · B A (out, in) in the dtype of W; the sum is taken in float32, or small updates vanish."""
    return (weight.float() + scaling * (lora_b.float() @ lora_a.float())).to(weight.dtype)


def add_lora(model: nn.Module, config: LoRAConfig, device: torch.device | None = None) -> None:
    """Freeze the model and put a LoRALinear in the place of each layer that the config targets.

    The adapter is on its base's device, unless another is named, as for a base whose weights are yet to come.
    """
    model.requires_grad_(False)
    for name in adapted_names(model, config):
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear | NF4Linear)
        layer = LoRALinear(linear, rank=config.r, scaling=config.scaling, dropout=config.lora_dropout)
        for matrix in (layer.lora_A, layer.lora_B):
            matrix.to(device or linear.weight.device)  # only now, so that a seed gives the same start on every device
        setattr(model.get_submodule(parent), child, layer)


def adapted_names(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the names of the linear layers that the config targets, in the model's order."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | NF4Linear)]
    try:
        with bounded():  # a pattern of a few characters can take years
            return [name for name in linears if config.targets(name)]
    except (MemoryError, TimeoutError) as error:
        raise LitLoraError(f"target_modules ({config.target_modules}) cannot be looked for: {error}") from error


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's matrices by name: `<layer>.lora_A.weight` and `<layer>.lora_B.weight`."""
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def count(model: nn.Module, *, trainable: bool) -> int:
    """Count the trainable, or the frozen, weights of a model; a byte holds two in NF4, whose scales are none."""
    weights_in = {"packed": 2, "scales": 0}
    named = ((name.rpartition(".")[2], p) for name, p in model.named_parameters() if p.requires_grad is trainable)
    return sum(p.numel() * weights_in.get(name, 1) for name, p in named)
