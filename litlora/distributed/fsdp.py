"""Sharded base weights (FSDP2): every device holds a shard and gathers one block at a time."""

from collections.abc import Iterable
from functools import partial

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from litlora.lora.config import LoRAConfig
from litlora.lora.layer import LoRALinear, add_lora, lora_layers, lora_parameters
from litlora.models.checkpoint import Checkpoint, assign
from litlora.models.transformer import GPT
from litlora.nn.nf4 import Quantization


def load_sharded(
    checkpoint: Checkpoint, dtype: torch.dtype, quantization: Quantization | None, lora: LoRAConfig, fabric: Fabric
) -> GPT:
    """Load a model whose frozen weights are sharded over the devices, with an adapter that each device holds in full.

    The adapter's gradients, optimizer and files are the same as without sharding.
    """
    mesh = _mesh(fabric)
    gpt, shards = checkpoint.load_shards(dtype, fabric.device, quantization, partial(_shard, mesh=mesh))
    add_lora(gpt, lora, fabric.device)
    adapter = set(lora_parameters(gpt).values())
    for module in (*gpt.model.layers, gpt):
        fully_shard(module, mesh=mesh, ignored_params=adapter)
    parameters = gpt.state_dict()
    assign(gpt, {name: _distributed(shard, parameters[name]) for name, shard in shards.items()})
    for block in gpt.model.layers:
        _initialize(block, lora_layers(block).values())
    _initialize(gpt, [layer for name, layer in lora_layers(gpt).items() if not name.startswith("model.layers.")])
    return gpt


def _initialize(module: nn.Module, layers: Iterable[LoRALinear]) -> None:
    """Let adapter layers start from their weights, which are gathered with this module and were not there before."""
    assert isinstance(module, FSDPModule)
    module.unshard()
    for layer in layers:
        layer.variant.init(layer)
    module.reshard()


def _mesh(fabric: Fabric) -> DeviceMesh:
    assert isinstance(fabric.strategy, ModelParallelStrategy)
    return fabric.strategy.device_mesh["data_parallel"]


def _shard(weight: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return a copy of this device's rows of a weight, as FSDP shards it; the last devices may have none."""
    size = -(-len(weight) // mesh.size())
    return weight[size * mesh.get_local_rank() :][:size].clone()


def _distributed(shard: Tensor, weight: Tensor) -> Tensor:
    """Return a shard as a DTensor like `weight`, which has no values; a weight that is not sharded stays as it is."""
    if not isinstance(weight, DTensor):
        return shard
    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())
