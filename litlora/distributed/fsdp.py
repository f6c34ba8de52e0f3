"""Sharded base weights (FSDP2): every device holds a shard and gathers one block at a time."""

from functools import partial

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from litlora.lora.config import LoRAConfig
from litlora.lora.layer import add_lora, lora_parameters
from litlora.models.checkpoint import Checkpoint, assign
from litlora.models.transformer import GPT
from litlora.nn.nf4 import Quantization


def load_sharded(
    checkpoint: Checkpoint, dtype: torch.dtype, quantization: Quantization | None, lora: LoRAConfig, fabric: Fabric
) -> GPT:
    """Load a model of which every device has a part of each frozen weight, with an adapter that each has as a whole.

    What becomes of the adapter (its gradients, its optimizer, its files) is the same as without sharding.
    """
    mesh = _mesh(fabric)
    gpt, parts = checkpoint.load_shards(dtype, fabric.device, quantization, partial(_part, mesh=mesh))
    add_lora(gpt, lora, fabric.device)
    adapter = set(lora_parameters(gpt).values())
    for module in (*gpt.model.layers, gpt):
        fully_shard(module, mesh=mesh, ignored_params=adapter)
    own = gpt.state_dict()
    assign(gpt, {name: _placed(part, own[name]) for name, part in parts.items()})
    return gpt


def _mesh(fabric: Fabric) -> DeviceMesh:
    assert isinstance(fabric.strategy, ModelParallelStrategy)
    return fabric.strategy.device_mesh["data_parallel"]


def _part(weight: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return a copy of the rows of a weight that are this device's, as FSDP deals them; the last ones may have none."""
    size = -(-len(weight) // mesh.size())
    return weight[size * mesh.get_local_rank() :][:size].clone()


def _placed(part: Tensor, whole: Tensor) -> Tensor:
    """Return the part as one of the whole, which has no values; what is not sharded stays as it is."""
    if not isinstance(whole, DTensor):
        return part
    mesh, placements = whole.device_mesh, whole.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
