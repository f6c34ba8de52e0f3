"""Initialization that compensates for the quantization error of the base, weighted by the Fisher information.

The Fisher information of a layer's weight is approximated by the Kronecker product of the second moments of the layer's
inputs and of its output gradients (K-FAC, Martens and Grosse 2015, arXiv 1503.05671). LQ-LoRA (Guo et al. 2024, arXiv
2311.12023) weights the error by the diagonal of the same information.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from litlora.errors import CORRUPT_WEIGHTS, LitLoraError
from litlora.lora.layer import LoRALinear
from litlora.lora.svd import leading_singular
from litlora.models.checkpoint import Checkpoint
from litlora.nn.nf4 import NF4Weight, dequantized

MAX_FULL_MOMENT = 1024
"""Channels up to which all second moments of a side are recorded; beyond, only the diagonal is."""
DAMPING = 0.01
"""Share of the mean second moment that is added for every channel."""
ITERATIONS = 4
"""Power iterations of the randomized SVD, whose error is then less than 1 % above the optimum."""

Moments = dict[str, Tensor]
"""By the name of a layer: second moments (n, n) of the vectors recorded there, or their diagonal (n,)."""


@torch.no_grad()
def initialize_from_fisher(
    layers: Mapping[str, LoRALinear],
    base: Checkpoint,
    backward: Callable[[], None],
    broadcast: Callable[[Tensor], Tensor],
) -> None:
    """Initialize new LoRA layers over NF4 to compensate for their quantization error, as far as their rank allows.

    `backward` runs forward and backward over some examples; `broadcast` gives all ranks the first rank's tensor.
    """
    with recording(layers) as (inputs, gradients):
        backward()
    for name, layer in layers.items():
        if not (inputs[name].isfinite().all() and gradients[name].isfinite().all()):
            raise LitLoraError(
                f"--lora_init fisher: {name} has inputs or gradients that are NaN or infinite: {CORRUPT_WEIGHTS}"
            )
        weight = base.tensor(f"{name}.weight").to(layer.weight.device).float()
        assert isinstance(layer.weight, NF4Weight)
        error = weight - dequantized(weight, layer.weight.quantization)
        fit_low_rank(layer, error, Metric.of(inputs.pop(name)), Metric.of(gradients.pop(name)))
        layer.variant.init(layer)
        for parameter in layer.adapter_parameters().values():
            broadcast(parameter)


@contextmanager
def recording(layers: Mapping[str, nn.Module]) -> Iterator[tuple[Moments, Moments]]:
    """Record, inside the block, the second moments of each layer's inputs and output gradients."""
    inputs: Moments = {}
    gradients: Moments = {}

    def record(name: str, _layer: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        add_moment(inputs, name, arguments[0])
        output.register_hook(partial(add_moment, gradients, name))  # type: ignore[no-untyped-call]

    handles = [layer.register_forward_hook(partial(record, name)) for name, layer in layers.items()]
    try:
        yield inputs, gradients
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def add_moment(moments: Moments, name: str, vectors: Tensor) -> None:
    """Add the second moments of vectors (T, n) to those recorded under this name."""
    rows = vectors.float()
    moment = rows.t() @ rows if rows.shape[1] <= MAX_FULL_MOMENT else rows.square().sum(dim=0)
    moments[name] = moments[name].add_(moment) if name in moments else moment


@dataclass(frozen=True)
class Metric:
    """How much errors along one side of a weight change the loss."""

    root: Tensor
    """Of the normalized second moments: their Cholesky factor (n, n), or the square roots of their diagonal (n,)."""

    @classmethod
    def of(cls, moment: Tensor) -> Self:
        """Normalize and damp second moments, so that a channel that no example uses still counts a little."""
        diagonal = moment.diagonal() if moment.dim() == 2 else moment
        mean = diagonal.mean().clamp(min=torch.finfo(diagonal.dtype).tiny)
        if moment.dim() == 1:
            return cls((moment / mean + DAMPING).sqrt())
        damping = DAMPING * torch.eye(len(moment), device=moment.device)
        return cls(torch.linalg.cholesky(moment / mean + damping))

    def apply(self, rows: Tensor) -> Tensor:
        """Return rows (m, n) whose Euclidean lengths are their lengths in this metric."""
        return rows @ self.root if self.root.dim() == 2 else rows * self.root

    def invert(self, rows: Tensor) -> Tensor:
        """Undo `apply`."""
        if self.root.dim() == 1:
            return rows / self.root
        out: Tensor = torch.linalg.solve_triangular(self.root, rows, upper=False, left=False)
        return out


def fit_low_rank(layer: LoRALinear, error: Tensor, inputs: Metric, gradients: Metric) -> None:
    """Set the layer's B A to the best approximation of an error (out, in), in the metrics of both of its sides.

    Rows and columns beyond the rank of the error stay as they are.
    """
    weighted = gradients.apply(inputs.apply(error).t()).t()
    u, s, v = leading_singular(weighted, layer.lora_A.out_features, ITERATIONS)
    root = (s / layer.scaling).sqrt()  # both matrices get the same share of a singular value
    layer.lora_B.weight[:, : len(s)] = gradients.invert((u * root).t()).t()
    layer.lora_A.weight[: len(s)] = inputs.invert((v * root).t())
