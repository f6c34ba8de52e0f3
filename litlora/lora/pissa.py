"""PiSSA: an adapter starts as the leading singular values and vectors of its weight, and the base holds the rest.

W = W_rest + scaling · B₀ A₀ (Meng et al. 2024, arXiv 2404.02948). Training changes A and B; a file that fits the base
itself has what changed, W + scaling · (B A - B₀ A₀), as matrices of twice the rank: [A; A₀] and [B, -B₀], as PEFT
converts them. B₀ and A₀ are in the file, so that a run that resumes from it finds the same W_rest.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from litlora.lora.layer import LoRALinear
from litlora.lora.svd import leading_singular
from litlora.models.checkpoint import EMBEDDING, Checkpoint
from litlora.models.layer_names import HEAD_LAYER
from litlora.nn.nf4 import NF4Weight


@torch.no_grad()
def initialize_from_weights(
    layers: Mapping[str, LoRALinear],
    base: Checkpoint,
    broadcast: Callable[[Tensor], Tensor],
    iterations: int | None = None,
) -> None:
    """Start each layer from its weight; with a number of iterations, the decomposition is approximate and far faster.

    `broadcast` gives all ranks the first rank's tensor. One weight at a time exists in float32.
    """
    for name, layer in layers.items():
        weight = base_weight(name, layer, base)
        fit_leading(layer, weight, iterations)
        layer.start = (
            broadcast(layer.lora_A.weight).detach().clone(),
            broadcast(layer.lora_B.weight).detach().clone(),
        )
        with rest_stored(layer, weight, is_tied=is_tied(name, base)):
            layer.variant.init(layer)
        for parameter in layer.adapter_parameters().values():
            broadcast(parameter)


@torch.no_grad()
def subtract_starts(layers: Mapping[str, LoRALinear], base: Checkpoint) -> None:
    """Leave in the weights of a run that resumes what its layers did not start from."""
    for name, layer in layers.items():
        if layer.start is not None:
            with rest_stored(layer, base_weight(name, layer, base), is_tied=is_tied(name, base)):
                pass


def fit_leading(layer: LoRALinear, weight: Tensor, iterations: int | None) -> None:
    """Set the layer's scaling · B A to the best approximation of a weight (out, in) of its rank."""
    u, s, v = leading_singular(weight, layer.lora_A.out_features, iterations)
    root = (s / layer.scaling).sqrt()  # both matrices get the same share of a singular value
    layer.lora_B.weight[:, : len(s)] = u * root
    layer.lora_A.weight[: len(s)] = (v * root).t()


def base_weight(name: str, layer: LoRALinear, base: Checkpoint) -> Tensor:
    """Return a layer's weight in the base, rounded as the run's precision has it, in float32 on the layer's device."""
    stored_name = EMBEDDING if is_tied(name, base) else f"{name}.weight"
    weight = base.tensor(stored_name).to(layer.lora_A.weight.device)
    stored = layer.weight.quantization.dtype if isinstance(layer.weight, NF4Weight) else layer.weight.dtype
    return weight.to(stored).float()


def is_tied(name: str, base: Checkpoint) -> bool:
    """Tell whether the weight of a layer is the embedding's as well."""
    return base.config.tie_word_embeddings and name == HEAD_LAYER


@contextmanager
def rest_stored(layer: LoRALinear, weight: Tensor, *, is_tied: bool) -> Iterator[None]:
    """Store what a layer does not start from in the way of its own weight: whole inside the block, then sharded again.

    It replaces the weight in place, unless that is the embedding's as well: memory that maps the checkpoint's file
    becomes a copy of the process's own.
    """
    assert layer.start is not None
    a, b = layer.start
    rest, own = torch.addmm(weight, b, a, alpha=-layer.scaling), layer.weight
    if isinstance(own, NF4Weight):
        layer.weight = NF4Weight(rest, own.quantization)
    else:
        layer.weight = nn.Parameter(rest.to(own.dtype), requires_grad=False)
    yield
    if not is_tied:
        for target, source in zip(stored_parts(own), stored_parts(layer.weight), strict=True):
            copy_whole(source, target)
        layer.weight = own


def stored_parts(weight: Tensor | NF4Weight) -> list[Tensor]:
    """Return the tensors in which a weight is stored."""
    return [*weight.parameters(), *weight.buffers()] if isinstance(weight, NF4Weight) else [weight]


def copy_whole(source: Tensor, target: Any) -> None:
    """Copy a tensor that each rank has into a target that may hold this rank's shard alone."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor  # takes a second, also of commands that shard nothing

        source = distribute_tensor(source.detach(), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)
