"""An adapter that begins by making up for what 4 bits lose of its base, where the loss feels it.

How much it feels an error of a layer's weight is the Fisher information, taken as the Kronecker product of the second
moments of the layer's inputs and of its output's gradients (K-FAC, Martens and Grosse 2015, arXiv 1503.05671). LQ-LoRA
(Guo et al. 2024, arXiv 2311.12023) weighs the error by the same information, of which it takes the diagonal.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from litlora.errors import DAMAGED, LitLoraError
from litlora.lora.layer import LoRALinear
from litlora.models.checkpoint import Weights
from litlora.nn.nf4 import NF4Weight, dequantized

WIDEST = 1024
"""How many channels a side of a layer has at most for the products of all pairs of them to be kept, not the squares."""
DAMPING = 0.01
"""How much every direction counts at least, as a share of what is usual."""
ITERATIONS = 4
"""Of the randomized decomposition, which then leaves less than 1 % more than the best there is."""

Moments = dict[str, Tensor]
"""By the name of a layer: the products (n, n) of the channels of vectors that were seen there, or the squares (n,)."""


@torch.no_grad()
def initialize_from_fisher(
    layers: Mapping[str, LoRALinear], base: Weights, backward: Callable[[], None], broadcast: Callable[[Tensor], Tensor]
) -> None:
    """Initialize new LoRA layers over NF4 to compensate for their quantization error, as far as their rank allows.

    `backward` runs forward and backward over some examples; `broadcast` gives all ranks what the first has.
    """
    with observing(layers) as (inputs, gradients):
        backward()
    for name, layer in layers.items():
        if not (inputs[name].isfinite().all() and gradients[name].isfinite().all()):
            raise LitLoraError(f"--lora_init fisher: {name} sees numbers that are NaN or infinite: {DAMAGED}")
        weight = base.once(f"{name}.weight").to(layer.weight.device).float()
        assert isinstance(layer.weight, NF4Weight)
        lost = weight - dequantized(weight, layer.weight.quantization)
        begin_with(layer, lost, Side.of(inputs.pop(name)), Side.of(gradients.pop(name)))
        for matrix in (layer.lora_A.weight, layer.lora_B.weight):
            broadcast(matrix)


def is_over_4_bits(layer: nn.Module) -> bool:
    return isinstance(layer, LoRALinear) and isinstance(layer.weight, NF4Weight)


@contextmanager
def observing(layers: Mapping[str, nn.Module]) -> Iterator[tuple[Moments, Moments]]:
    """Add up, inside the block, the moments of what goes into each layer and of the gradients that come back to it."""
    inputs: Moments = {}
    gradients: Moments = {}

    def see(name: str, _layer: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        add_moment(inputs, name, arguments[0])
        output.register_hook(partial(add_moment, gradients, name))  # type: ignore[no-untyped-call]

    handles = [layer.register_forward_hook(partial(see, name)) for name, layer in layers.items()]
    try:
        yield inputs, gradients
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def add_moment(moments: Moments, name: str, vectors: Tensor) -> None:
    """Add the moment of some vectors (T, n) to what is there."""
    wide = vectors.float()
    moment = wide.t() @ wide if wide.shape[1] <= WIDEST else wide.square().sum(dim=0)
    moments[name] = moments[name].add_(moment) if name in moments else moment


@dataclass(frozen=True)
class Side:
    """How much errors along one side of a weight count."""

    root: Tensor
    """Of the moment: its Cholesky factor (n, n), or the roots of the squares (n,), where what is usual is 1."""

    @classmethod
    def of(cls, moment: Tensor) -> Self:
        """Damp a moment, so that no direction counts for nothing because the examples did not show it."""
        squares = moment.diagonal() if moment.dim() == 2 else moment
        usual = squares.mean().clamp(min=torch.finfo(squares.dtype).tiny)
        if moment.dim() == 1:
            return cls((moment / usual + DAMPING).sqrt())
        damping = DAMPING * torch.eye(len(moment), device=moment.device)
        return cls(torch.linalg.cholesky(moment / usual + damping))

    def weighed(self, rows: Tensor) -> Tensor:
        """Return rows (m, n) whose lengths are what they count."""
        return rows @ self.root if self.root.dim() == 2 else rows * self.root

    def unweighed(self, rows: Tensor) -> Tensor:
        """Undo `weighed`."""
        if self.root.dim() == 1:
            return rows / self.root
        out: Tensor = torch.linalg.solve_triangular(self.root, rows, upper=False, left=False)
        return out


def begin_with(layer: LoRALinear, lost: Tensor, inputs: Side, gradients: Side) -> None:
    """Give a layer's branch the product that comes nearest to a matrix (out, in), measured along both of its sides.

    What a rank has beyond that of the matrix stays as it was.
    """
    weighed = gradients.weighed(inputs.weighed(lost).t()).t()
    rank = min(layer.lora_A.out_features, *lost.shape)
    u, s, v = (t[..., :rank] for t in torch.svd_lowrank(weighed, min(2 * rank, *lost.shape), ITERATIONS))
    signs = v.gather(0, v.abs().argmax(dim=0, keepdim=True)).sign()
    u, v = u * signs, v * signs  # or rounding would decide which way a direction points
    root = (s / layer.scaling).sqrt()  # which both matrices get alike
    layer.lora_B.weight[:, :rank] = gradients.unweighed((u * root).t()).t()
    layer.lora_A.weight[:rank] = inputs.unweighed((v * root).t())
