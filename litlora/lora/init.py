"""Initializations of new adapter layers, by their names in --lora_init."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from litlora.lora.fisher import initialize_from_fisher
from litlora.lora.layer import LoRALinear
from litlora.lora.pissa import initialize_from_weights
from litlora.models.checkpoint import Checkpoint
from litlora.nn.nf4 import NF4Weight


@dataclass(frozen=True)
class Calibration:
    """What an initialization can use beside the layers."""

    base: Checkpoint
    """The base, whose weights are not quantized."""
    backward: Callable[[], None]
    """Runs forward and backward over some examples, and retains no gradient."""
    broadcast: Callable[[Tensor], Tensor]
    """Gives all ranks the first rank's tensor, in place."""


Initializer = Callable[[Mapping[str, LoRALinear], Calibration], None]


def zero(layers: Mapping[str, LoRALinear], calibration: Calibration) -> None:
    """Leave new layers as they are: B is zero, so that the model starts as its base."""


def fisher(layers: Mapping[str, LoRALinear], calibration: Calibration) -> None:
    """Compensate for the quantization error of the layers over NF4, weighted by the Fisher information."""
    quantized = {name: layer for name, layer in layers.items() if isinstance(layer.weight, NF4Weight)}
    initialize_from_fisher(quantized, calibration.base, calibration.backward, calibration.broadcast)


def pissa(layers: Mapping[str, LoRALinear], calibration: Calibration, iterations: int | None = None) -> None:
    """Start from the leading singular values and vectors of the weights, which retain the rest."""
    initialize_from_weights(layers, calibration.base, calibration.broadcast, iterations)


INITIALIZERS: dict[str, Initializer] = {
    "zero": zero,
    "fisher": fisher,
    "pissa": pissa,
    "pissa_niter_4": partial(pissa, iterations=4),
    "pissa_niter_16": partial(pissa, iterations=16),
}
