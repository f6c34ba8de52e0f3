"""Optimizers of torch and bitsandbytes by name or class path."""

import importlib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from litlora.errors import LitLoraError
from litlora.lora.layer import LoRALinear
from litlora.lora.variants import A
from litlora.nn.backend import backend
from litlora.nn.nf4 import import_bitsandbytes
from litlora.train.optimizer_names import PAGED, class_path_of, no_optimizer

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
"""Parameters, or groups of them with settings of their own."""
FUSED = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
KERNELS = {"foreach", "fused", "capturable", "differentiable"}
"""Settings of torch's optimizers that exclude each other."""
RATIO = "lr_ratio"
"""Setting of a group: its learning rate as a multiple of the schedule's."""


def adapter_groups(layers: Iterable[LoRALinear], ratio: float) -> Parameters:
    """Return what adapter layers train, in groups if B learns `ratio` times as fast as A (LoRA+).

    As in PEFT, what else a variant trains learns as fast as B (Hayou et al. 2024, arXiv 2402.12354).
    """
    named = [pair for layer in layers for pair in layer.adapter_parameters().items()]
    if ratio == 1:
        return [parameter for _, parameter in named]
    slow = [parameter for name, parameter in named if name == A]
    fast: dict[str, Any] = {"params": [parameter for name, parameter in named if name != A], RATIO: ratio}
    return [{"params": slow}, fast]


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the rate of each group of parameters for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATIO, 1)


def build_optimizer(optimizer: str | dict[str, Any], parameters: Parameters, lr: float) -> Optimizer:
    """Build an optimizer from its name in torch or bitsandbytes, or from its class_path and init_args."""
    class_path = class_path_of(optimizer)
    init_args = optimizer.get("init_args") if isinstance(optimizer, dict) else None
    kind = _find(class_path)
    try:
        groups: list[Any] = list(parameters)
        return kind(groups, **{"lr": lr, **kernels(kind, groups, init_args or {}), **(init_args or {})})
    except (RuntimeError, TypeError, ValueError) as error:
        raise LitLoraError(f"--optimizer {class_path} refuses its init_args: {error}") from error


def kernels(kind: type[Optimizer], groups: Sequence[Any], init_args: dict[str, Any]) -> dict[str, bool]:
    """Have a step be one kernel where the device has it and the user has not chosen: a GPU waits for each of many."""
    if kind not in FUSED or KERNELS & init_args.keys():
        return {}
    parameters = (p for group in groups for p in (group["params"] if isinstance(group, dict) else [group]))
    is_fused = all(p.dtype is torch.float32 and backend(p.device).fuses_optimizers(p.device) for p in parameters)
    return {"fused": True} if is_fused else {}


def check_optimizer(optimizer: str | dict[str, Any], lr: float, device: torch.device, ratio: float = 1) -> None:
    """Refuse an optimizer that cannot be built or cannot take a step, by one step of a throw-away layer."""
    layer = LoRALinear(nn.Linear(2, 2, device=device), rank=2, scaling=1.0, dropout=0.0)
    built = build_optimizer(optimizer, adapter_groups([layer], ratio), lr)
    for parameter in layer.adapter_parameters().values():
        parameter.grad = torch.ones_like(parameter)
    try:
        set_learning_rate(built, lr)
        built.step()
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise LitLoraError(f"--optimizer {type(built).__name__} cannot take a step: {error}") from error


def _find(class_path: str) -> type[Optimizer]:
    module, _, name = class_path.rpartition(".")
    if class_path in PAGED:
        import_bitsandbytes(f"--optimizer {name}")
        module = "bitsandbytes.optim"
    if name in PAGED and PAGED[name] and not torch.cuda.is_available():
        hint = "and there is none here; choose AdamW8bit or AdamW"
        raise LitLoraError(f"--optimizer {class_path} moves its state out of a full GPU, {hint}")
    try:
        kind = getattr(importlib.import_module(module or "torch.optim"), name, None)
    except (ImportError, TypeError) as error:  # TypeError: a relative name
        raise LitLoraError(f"--optimizer {class_path} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise no_optimizer(class_path)
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise LitLoraError(f"--optimizer {class_path} evaluates the loss several times a step, which is not supported")
    return kind
